// node --perf-basic-prof --interpreted-frames-native-stack with_node.js PORT
// /burn/N burns CPU in a function that no other request has; /wait/N too, with waits in between. X-Burned-Ns says how much.
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

require('node:http')
  .createServer((request, response) => {
    const [, kind, number] = request.url.split('/');
    request.resume();
    request.on('end', async () => {
      const burn = make(number);
      const turns = kind === 'wait' ? 5 : 1;
      let burned = 0n;
      for (let turn = 0; turn < turns; turn++) {
        const begin = clock();
        burn(begin + 10000000n / BigInt(turns), clock);
        burned += clock() - begin;
        if (kind === 'wait') await new Promise((resolve) => setTimeout(resolve, 1));
      }
      response.setHeader('X-Burned-Ns', String(burned));
      response.end('ok');
    });
  })
  .listen(Number(process.argv[2]), '127.0.0.1');
