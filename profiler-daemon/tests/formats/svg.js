// Uses a flame graph as a person would, once opened from disk and once embedded in a page under a strict
// Content-Security-Policy, and prints what was seen. Arguments: the browser, the file.
"use strict";
const fs = require("fs");
const http = require("http");
const { chromium } = require("playwright-core");

const POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; sandbox allow-scripts";

// Name and width in percent of the frames on display, from the top.
async function frames(frame) {
  return frame.$$eval(".f", (all) => all
    .filter((g) => g.style.display !== "none")
    .map((g) => [g.getAttribute("aria-label").split(",")[0], Number.parseFloat(g.querySelector("rect").getAttribute("width"))])
    .map(([name, width]) => [name, width.toFixed(1)]));
}

async function use(page, frame) {
  const seen = {};
  const rect = (name) => `.f[aria-label^="${name},"] rect`;
  const found = () => frame.$eval("#found", (span) => span.textContent);
  await frame.waitForSelector("svg.live");
  seen.start = await frames(frame);
  await frame.hover(rect("Order.load"));
  seen.tip = await frame.$$eval("#tip.on tspan", (all) => all.map((span) => span.textContent));
  await frame.click(rect("Order.load"));
  seen.zoomed = await frames(frame);
  await frame.click("#reset");
  seen.reset = await frames(frame);
  await page.keyboard.press("/");
  await page.keyboard.type("ORDER");
  seen.search = await found();
  seen.hits = await frame.$$eval(".f.hit", (all) => all.length);
  await frame.fill("#q", "/views.py:1[0-9]$/");
  seen.regex = await found();
  await frame.fill("#q", "/(/");
  seen.badRegex = await found();
  await page.keyboard.press("Escape");
  seen.cleared = [await frame.$eval("#q", (input) => input.value), await found()];
  // From the root: down to its hottest child, down, right to the sibling, and into it.
  for (const key of ["ArrowDown", "ArrowDown", "ArrowRight", "Enter"]) await page.keyboard.press(key);
  seen.keyboard = await frames(frame);
  await page.keyboard.press("Escape");
  const top = () => frame.$eval(".f rect", (root) => Number(root.getAttribute("y")));
  const before = await top();
  await page.keyboard.press("f");
  seen.flipped = (await top()) - before;
  return seen;
}

(async () => {
  const [executablePath, file] = process.argv.slice(1).filter((argument) => argument !== "--");
  const server = http.createServer((request, response) => {
    if (request.url === "/graph.svg") {
      response.writeHead(200, { "Content-Type": "image/svg+xml", "Content-Security-Policy": POLICY });
      response.end(fs.readFileSync(file));
    } else {
      response.writeHead(200, { "Content-Type": "text/html" });
      response.end('<!DOCTYPE html><iframe src="/graph.svg" width="1200" height="600"></iframe>');
    }
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  const errors = [];
  const open = async (address) => {
    const page = await browser.newPage({ viewport: { width: 1280, height: 720 } });
    page.setDefaultTimeout(20000);
    page.on("pageerror", (error) => errors.push(error.message));
    page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
    await page.goto(address);
    return page;
  };
  const page = await open(`file://${file}`);
  const disk = await use(page, page.mainFrame());
  const host = await open(`http://127.0.0.1:${server.address().port}/`);
  const inner = await (await host.waitForSelector("iframe")).contentFrame();
  const embedded = await use(host, inner);
  await browser.close();
  server.close();
  console.log(JSON.stringify({ disk, embedded, errors: errors.filter((text) => !/favicon|404/.test(text)) }));
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
