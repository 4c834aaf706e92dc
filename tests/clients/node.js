// Test client with the `ws` library: node.js URL PROTOCOL|- deflate|plain
// Prints one line per event; closes the session at the end of its input.
const WebSocket = require('ws');

const [url, protocol, compression] = process.argv.slice(2);
const socket = new WebSocket(url, protocol === '-' ? [] : [protocol], {
  perMessageDeflate: compression === 'deflate',
});
const say = (...words) => process.stdout.write(`${words.join(' ')}\n`);

socket.on('open', () => {
  say('open', socket.protocol || '-', socket.extensions || '-');
  socket.send('{"last_sequences":{}}');
});
socket.on('message', (data, binary) =>
  say(...(binary ? ['binary', data.toString('base64')] : ['text', data.toString()])));
socket.on('close', (code, reason) => {
  say('closed', code, reason);
  process.exit();
});
socket.on('error', (error) => say('error', error.message));
process.stdin.on('end', () => socket.close(1000)).resume();
