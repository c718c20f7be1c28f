// Opens exports in speedscope's own page and prints, per file, the rows of its table as [total, self, name].
// Arguments: the browser, a scratch directory, the files.
"use strict";
const fs = require("fs");
const path = require("path");
const { chromium } = require("playwright-core");

async function table(page, scratch, file) {
  // The page takes a local file as speedscope's command line gives it: as a script that hands over its contents.
  const loader = path.join(scratch, "loader.js");
  const call = [path.basename(file), fs.readFileSync(file).toString("base64")].map((text) => JSON.stringify(text));
  fs.writeFileSync(loader, `speedscope.loadFileFromBase64(${call.join(",")})`);
  const index = path.resolve("node_modules/speedscope/dist/release/index.html");
  await page.goto(`file://${index}#localProfilePath=${loader}&view=sandwich`);
  await page.waitForSelector("table");
  const rows = await page.$$eval("tr", (all) => all.slice(1).map((row) => row.innerText));
  return rows.map((row) => row.split(/\s*[\t\n]+\s*/).map((cell) => cell.trim()).filter(Boolean));
}

(async () => {
  const [executablePath, scratch, ...files] = process.argv.slice(1).filter((argument) => argument !== "--");
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  const result = {};
  for (const file of files) {
    const page = await browser.newPage();
    page.setDefaultTimeout(20000);
    result[path.basename(file)] = await table(page, scratch, file);
  }
  await browser.close();
  console.log(JSON.stringify(result));
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
