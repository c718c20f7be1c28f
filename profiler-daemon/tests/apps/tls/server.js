// node server.js PORT CERTIFICATE KEY: answers each request over TLS once it has all of its body.
const { readFileSync } = require('node:fs');
const [port, cert, key] = process.argv.slice(2);
require('node:https')
  .createServer({ cert: readFileSync(cert), key: readFileSync(key) }, (request, response) => {
    request.on('data', () => {});
    request.on('end', () => response.end('x'.repeat(1000)));
  })
  .listen(Number(port), '127.0.0.1');
