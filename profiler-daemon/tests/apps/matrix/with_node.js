// node --perf-basic-prof --interpreted-frames-native-stack with_node.js PORT [CERTIFICATE KEY]
// /burn/N burns CPU in a function that no other request has; /wait/N too, with waits in between. With a certificate it ends
// TLS itself.
const { readFileSync } = require('node:fs');
const [port, cert, key] = process.argv.slice(2);
const kept = [];

function make(number) {
  const burn = new Function(
    `return function own_${number}(until, clock) { let n = 0; while (clock() < until) n++; return n; }`,
  )();
  kept.push(burn);
  return burn;
}

// Node has no clock of its thread's CPU time before 23. While nothing else wants the CPU,
// time is that.
const clock = () => process.hrtime.bigint();

function serve(request, response) {
  const [, kind, number] = request.url.split('/');
  request.resume();
  request.on('end', async () => {
    const burn = make(number);
    const turns = kind === 'wait' ? 5 : 1;
    for (let turn = 0; turn < turns; turn++) {
      burn(clock() + 10000000n / BigInt(turns), clock);
      if (kind === 'wait') await new Promise((resolve) => setTimeout(resolve, 1));
    }
    response.end('ok');
  });
}

const server = cert
  ? require('node:https').createServer({ cert: readFileSync(cert), key: readFileSync(key) }, serve)
  : require('node:http').createServer(serve);
server.listen(Number(port), '127.0.0.1');
