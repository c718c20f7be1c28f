// Uses the web page as a person would, and prints what was seen. Arguments: the browser, the page's address.
"use strict";
const { chromium } = require("playwright-core");

const ID = (n) => n.toString(16).padStart(24, "0");

(async () => {
  const [executablePath, address] = process.argv.slice(1).filter((argument) => argument !== "--");
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  const page = await browser.newPage({ viewport: { width: 1280, height: 900 } });
  page.setDefaultTimeout(20000);
  const errors = [];
  page.on("pageerror", (error) => errors.push(error.message));
  // A browser logs what is not found; that is asked for below.
  page.on("console", (message) => message.type() === "error" && !/404|400/.test(message.text()) && errors.push(message.text()));

  const text = (selector) => page.textContent(selector);
  const open = async (hash) => {
    await page.goto("about:blank");
    await page.goto(address + hash);
  };
  const names = async () => {
    const frame = await (await page.waitForSelector("#frame iframe")).contentFrame();
    await frame.waitForSelector("svg.live");
    return frame.$$eval(".f", (all) => all.map((g) => g.getAttribute("aria-label").split(", ")[0]));
  };
  const title = async () => {
    await page.waitForSelector("#detail h2:not(:empty)");
    return text("#detail h2");
  };
  const pressed = () => text(".views button[aria-pressed=true]");
  const seen = { errors };

  await open("#request/" + ID(3));
  seen.deep = { title: await title(), graph: await names(), view: await pressed() };
  await page.reload();
  seen.deep.reloaded = await title();
  await page.click("#close");
  await page.waitForSelector("#detail", { state: "hidden" });
  seen.deep.closed = [await page.isHidden("#frame iframe"), await page.evaluate(() => location.hash)];

  await open("#request/" + ID(3));
  await names();
  await page.click(".views button:has-text('wall')");
  await page.waitForFunction(() => document.querySelector("#frame iframe")?.src.includes("wall"));
  const graph = await names();
  await page.reload();
  await names();
  seen.wall = { graph, view: await pressed() };

  await open("#request/" + ID(255));
  await page.waitForSelector("#note.error");
  seen.unknown = await text("#note");
  await open("#request/" + ID(7));
  seen.missed = { graph: await names(), remark: await text("#note") };
  await open("#request/" + ID(9));
  await page.waitForSelector("#note:not([hidden])");
  seen.without = await text("#note");
  await open("#route/shop/");
  await page.waitForSelector("#note:not([hidden])");
  seen.unseen = { title: await title(), remark: await text("#note"), links: await page.locator("#related a").count() };

  await open("#requests");
  await page.waitForSelector("#list tbody tr");
  const buttons = () => page.$$eval("#list th button", (all) => all.map((button) => button.textContent.replace(" ↑", "")));
  await page.click("#list th button:has-text('duration')");
  await page.waitForFunction(() => document.querySelector("#list th[aria-sort=descending]")?.textContent.includes("duration"));
  await page.waitForFunction(() => document.querySelector("#list tbody tr")?.dataset.key.endsWith("03"));
  seen.sorted = {
    first: await page.$eval("#list tbody tr", (row) => [...row.cells].map((cell) => cell.textContent).find((value) => value.endsWith(" ms"))),
    buttons: await buttons(),
  };
  await page.click("#more");
  await page.waitForFunction(() => document.querySelectorAll("#list tbody tr").length === 101);
  seen.sorted.paused = await text("#paused");
  seen.sorted.all = await buttons();

  await page.focus("#list tbody tr:nth-child(2)");
  await page.keyboard.press("Enter");
  await page.waitForSelector("#detail", { state: "visible" });
  await page.keyboard.press("Escape");
  await page.waitForSelector("#detail", { state: "hidden" });
  seen.keys = [await page.isHidden("#detail"), await page.$eval("#list tbody tr:nth-child(2)", (row) => document.activeElement === row)];

  await open("#route/shop/" + encodeURIComponent("/orders/{id}"));
  seen.route = { title: await title(), graph: await names(), link: await page.getAttribute("#related a", "href") };
  await page.click("#related a");
  await page.waitForSelector("#list tbody tr");
  seen.route.filtered = [await page.inputValue("[name=service]"), await page.inputValue("[name=route]")];

  await page.fill("[name=min_duration]", "fast");
  await page.keyboard.press("Enter");
  await page.waitForSelector("#problem:not([hidden])");
  seen.bad = await text("#problem");

  await page.setViewportSize({ width: 390, height: 800 });
  await open("#request/" + ID(3));
  await names();
  seen.narrow = await page.evaluate(() => [window.innerWidth, document.documentElement.scrollWidth]);

  await browser.close();
  console.log(JSON.stringify(seen));
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
