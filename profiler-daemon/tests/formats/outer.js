// Opens a flame graph with many rows around the application and uses the control that shows them. Arguments: the
// browser, the file.
"use strict";
const { chromium } = require("playwright-core");

(async () => {
  const [executablePath, file] = process.argv.slice(1).filter((argument) => argument !== "--");
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  const page = await browser.newPage({ viewport: { width: 1280, height: 720 } });
  page.setDefaultTimeout(20000);
  await page.goto(`file://${file}`);
  await page.waitForSelector("svg.live");
  // Name and row of the frames on display, in the order of the file.
  const frames = () => page.$$eval(".f", (all) => {
    const y = (g) => Number(g.querySelector("rect").getAttribute("y"));
    return all
      .filter((g) => g.style.display !== "none")
      .map((g) => [g.getAttribute("aria-label").split(",")[0], (y(g) - y(all[0])) / 20]);
  });
  const seen = { start: await frames(), control: await page.textContent("#outer") };
  for (let i = 0; i < 3; i += 1) await page.keyboard.press("ArrowDown");
  seen.walked = await page.$eval(".f.sel", (g) => g.getAttribute("aria-label").split(",")[0]);
  await page.click("#outer");
  seen.shown = await frames();
  await page.click("#outer");
  seen.again = await frames();
  await browser.close();
  console.log(JSON.stringify(seen));
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
