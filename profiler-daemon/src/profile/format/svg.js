(function () {
  "use strict";
  var NS = "http://www.w3.org/2000/svg";
  var svg = (document.currentScript && document.currentScript.ownerSVGElement) || document.documentElement;
  var find = function (selector) { return svg.querySelector(selector); };
  var number = function (name) { return Number(svg.getAttribute("data-" + name)); };
  var PAD = number("pad"), ROW = number("row"), TOP = number("top"), TOTAL = number("total");
  var frames = [], deepest = 0, stack = [];

  // Everything is read once from the drawing: [x, width] as parts of the whole, the depth, and the description.
  svg.querySelectorAll(".f").forEach(function (g, index) {
    var rect = g.querySelector("rect"), title = g.querySelector("title");
    var depth = Number(g.getAttribute("data-d"));
    var about = title.textContent.split("\n");
    title.remove();
    stack.length = depth;
    var frame = {
      g: g, rect: rect, text: g.querySelector("text"), depth: depth, about: about, index: index,
      x: Number(g.getAttribute("data-x")), w: Number(g.getAttribute("data-w")),
      parent: depth ? stack[depth - 1] : null, children: [], key: (about[0] + "\n" + about[1]).toLowerCase()
    };
    if (frame.parent) frame.parent.children.push(frame);
    stack[depth] = frame;
    deepest = Math.max(deepest, depth);
    g.setAttribute("tabindex", "-1");
    g.setAttribute("aria-label", about.join(", "));
    g.frame = frame;
    frames.push(frame);
  });
  // Frames of servers and frameworks around the application are many rows that say little: what leads to application
  // code, and is not called by it, can be hidden. The others keep their order and move up.
  frames.forEach(function (frame) {
    frame.app = frame.rect.getAttribute("class").charAt(0) === "a";
    frame.inside = frame.app || !!frame.parent && frame.parent.inside;
  });
  for (var i = frames.length - 1; i > 0; i -= 1) {
    frames[i].leads = frames[i].leads || frames[i].app;
    frames[i].parent.leads = frames[i].parent.leads || frames[i].leads;
  }
  function outer(frame) { return frame.depth > 0 && frame.leads && !frame.inside; }
  var FOLD_FROM = 4, most = 0, folded = false;
  frames.forEach(function (frame) {
    frame.outer = (frame.parent ? frame.parent.outer : 0) + (outer(frame) ? 1 : 0);
    most = Math.max(most, frame.outer);
  });
  function hidden(frame) { return folded && outer(frame); }
  function place() {
    deepest = 0;
    frames.forEach(function (frame) {
      frame.row = frame.depth - (folded ? frame.outer : 0);
      if (!hidden(frame)) deepest = Math.max(deepest, frame.row);
    });
  }

  var root = frames[0], zoomed = root, selected = null, flame = false, letter = 7.3;
  var input = find("#q"), found = find("#found"), reset = find("#reset"), flip = find("#flip"), tip = find("#tip");
  var outers = find("#outer");
  svg.classList.add("live");
  fold(most >= FOLD_FROM);

  function fold(on) {
    folded = on;
    outers.style.display = most >= FOLD_FROM ? "" : "none";
    outers.textContent = folded ? "Show " + most + " outer rows" : "Hide outer rows";
    place();
  }

  function width() { return svg.getBoundingClientRect().width || 1200; }

  // Characters outside ASCII may be twice as wide.
  function cells(text) {
    var n = 0;
    for (var c of text) n += c.codePointAt(0) > 0x2e7f ? 2 : 1;
    return n;
  }

  function cut(text, room) {
    if (cells(text) <= room) return text;
    var out = "", n = 1;
    for (var c of text) {
      n += c.codePointAt(0) > 0x2e7f ? 2 : 1;
      if (n > room) break;
      out += c;
    }
    return out + "\u2026";
  }

  function label(frame, pixels) {
    var room = Math.floor((pixels - 10) / letter), text = frame.text, name = frame.about[0], place = frame.about[1];
    text.textContent = "";
    if (room < 3) return;
    text.appendChild(document.createTextNode(cut(name, room)));
    if (place && cells(name) + cells(place) + 2 <= room) {
      var span = document.createElementNS(NS, "tspan");
      span.setAttribute("class", "place");
      span.textContent = "  " + place;
      text.appendChild(span);
    }
  }

  function draw() {
    var all = width() * (100 - 2 * PAD) / 100, end = zoomed.x + zoomed.w, tiny = 1e-9;
    frames.forEach(function (frame) {
      var above = frame.depth < zoomed.depth && frame.x <= zoomed.x + tiny && frame.x + frame.w >= end - tiny;
      var inside = frame.depth >= zoomed.depth && frame.x >= zoomed.x - tiny && frame.x + frame.w <= end + tiny;
      var part = above ? 1 : frame.w / zoomed.w;
      if (!(above || inside) || part * all < 0.2 || hidden(frame)) {
        frame.g.style.display = "none";
        return;
      }
      var x = PAD + (100 - 2 * PAD) * (above ? 0 : (frame.x - zoomed.x) / zoomed.w);
      var y = TOP + ROW * (flame ? deepest - frame.row : frame.row);
      frame.g.style.display = "";
      frame.g.classList.toggle("above", above);
      frame.rect.setAttribute("x", x + "%");
      frame.rect.setAttribute("width", (100 - 2 * PAD) * part + "%");
      frame.rect.setAttribute("y", y);
      frame.text.setAttribute("x", x + "%");
      frame.text.setAttribute("y", y + ROW - 7);
      label(frame, all * part);
    });
    reset.disabled = zoomed === root;
  }

  function zoom(frame) {
    zoomed = frame;
    select(frame);
    draw();
  }

  function select(frame) {
    if (selected) selected.g.classList.remove("sel");
    selected = frame === root ? null : frame;
    if (selected) {
      selected.g.classList.add("sel");
      selected.g.focus({ preventScroll: true });
    }
  }

  function time(ns) {
    var ms = ns / 1e6;
    return ms >= 1000 ? (ms / 1000).toFixed(2) + " s" : ms >= 10 ? ms.toFixed(1) + " ms" :
      ms >= 1 ? ms.toFixed(2) + " ms" : (ms * 1000).toFixed(0) + " \u00b5s";
  }

  // A text, or a regular expression between slashes.
  function search(query) {
    var match = null, regex = /^\/(.+)\/$/.exec(query);
    if (regex) {
      try {
        var pattern = new RegExp(regex[1], "i");
        match = function (frame) { return pattern.test(frame.about[0]) || pattern.test(frame.about[1]); };
      } catch (error) {
        found.textContent = "not a regular expression";
        svg.classList.remove("searching");
        return;
      }
    } else if (query) {
      var text = query.toLowerCase();
      match = function (frame) { return frame.key.indexOf(text) >= 0; };
    }
    var sum = 0, count = 0, covered = -1;
    frames.forEach(function (frame) {
      var hit = !!match && frame !== root && match(frame);
      frame.g.classList.toggle("hit", hit);
      if (!hit) return;
      count += 1;
      // Frames come parents first, from left to right: what begins left of `covered` lies below another hit.
      if (frame.x >= covered - 1e-9) {
        sum += frame.w;
        covered = frame.x + frame.w;
      }
    });
    svg.classList.toggle("searching", !!match);
    found.textContent = !match ? "" : !count ? "no match" :
      (sum * 100).toFixed(1) + " % \u00b7 " + time(sum * TOTAL) + " \u00b7 " + count + (count === 1 ? " frame" : " frames");
  }

  function show(frame, event) {
    var texts = tip.querySelector("text"), box = tip.querySelector("rect");
    texts.textContent = "";
    var room = Math.max(30, Math.floor((width() - 60) / 7.2)), row = 0;
    frame.about.forEach(function (line, index) {
      if (!line) return;
      var span = document.createElementNS(NS, "tspan");
      span.setAttribute("x", 12);
      span.setAttribute("y", 22 + 18 * row);
      span.setAttribute("class", index === 0 ? "name" : index === 1 ? "dim" : "");
      span.textContent = cut(line, room);
      texts.appendChild(span);
      row += 1;
    });
    var size = texts.getBBox(), area = svg.getBoundingClientRect();
    var w = size.width + 24, h = 18 * row + 14;
    box.setAttribute("width", w);
    box.setAttribute("height", h);
    var x = event.clientX - area.left + 14, y = event.clientY - area.top + 18;
    if (x + w > area.width - 6) x = Math.max(6, event.clientX - area.left - w - 10);
    var bottom = Math.min(area.height, window.innerHeight - area.top);
    if (y + h > bottom - 6) y = Math.max(6 - Math.min(0, area.top), event.clientY - area.top - h - 12);
    tip.setAttribute("transform", "translate(" + x + " " + y + ")");
    tip.classList.add("on");
  }

  function target(event) {
    var g = event.target.closest && event.target.closest(".f");
    return g ? g.frame : null;
  }

  svg.addEventListener("click", function (event) {
    var frame = target(event);
    if (frame) zoom(frame === zoomed && frame.parent ? callerOf(frame) : frame);
  });
  svg.addEventListener("mousemove", function (event) {
    var frame = target(event);
    if (frame) show(frame, event); else tip.classList.remove("on");
  });
  svg.addEventListener("mouseleave", function () { tip.classList.remove("on"); });
  input.addEventListener("input", function () { search(input.value.trim()); });
  reset.addEventListener("click", function () { zoom(root); });
  function turn() {
    flame = !flame;
    flip.textContent = flame ? "Root at top" : "Root at bottom";
    draw();
  }
  flip.addEventListener("click", turn);
  outers.addEventListener("click", function () {
    fold(!folded);
    // A hidden frame cannot be the one that fills the width.
    if (hidden(zoomed)) zoomed = root;
    zoom(zoomed);
  });

  // What stands below a frame, hottest first; hidden frames are passed over both ways.
  function below(frame) {
    var all = [];
    frame.children.forEach(function (child) {
      if (hidden(child)) all = all.concat(below(child)); else if (shown(child)) all.push(child);
    });
    return all.sort(function (a, b) { return b.w - a.w; });
  }

  function callerOf(frame) {
    do frame = frame.parent; while (frame && hidden(frame));
    return frame;
  }

  function shown(frame) { return frame && frame.g.style.display !== "none"; }

  function move(key) {
    var from = selected || zoomed, to = null;
    var down = flame ? "ArrowUp" : "ArrowDown", up = flame ? "ArrowDown" : "ArrowUp";
    if (key === down) to = below(from)[0];
    else if (key === up) to = callerOf(from);
    else {
      var row = frames.filter(function (f) { return f.row === from.row && shown(f); });
      row.sort(function (a, b) { return a.x - b.x; });
      to = row[row.indexOf(from) + (key === "ArrowRight" ? 1 : -1)];
    }
    if (to) {
      select(to);
      to.g.scrollIntoView({ block: "nearest" });
    }
  }

  document.addEventListener("keydown", function (event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      input.value = "";
      search("");
      input.blur();
      zoom(root);
    } else if (event.target === input || event.target.tagName === "button") {
      return;
    } else if (event.key === "/") {
      input.focus();
    } else if (event.key === "f") {
      turn();
    } else if (event.key === "Enter" && selected) {
      zoom(selected);
    } else if (event.key === "Backspace") {
      zoom(callerOf(zoomed) || root);
    } else if (/^Arrow/.test(event.key)) {
      move(event.key);
    } else {
      return;
    }
    event.preventDefault();
  });

  window.addEventListener("resize", draw);
  // The width of a letter in whatever monospaced font the browser has.
  root.text.textContent = "0123456789";
  letter = root.text.getComputedTextLength() / 10 || letter;
  draw();
})();
