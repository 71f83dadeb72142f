// Runs the trace processor that Perfetto's page runs in a browser's worker: requests from stdin, replies to stdout, both
// streams of protobuf messages. The argument is the folder of `engine_bundle.js`. It knows nothing of what they say.
import fs from "node:fs";
import path from "node:path";
import vm from "node:vm";

const folder = process.argv[2];
const read = (url) => fs.readFileSync(path.join(folder, path.basename(url)));

class XMLHttpRequest {
  open(_, url) { this.url = url; }
  send() { this.response = read(this.url); }
}

// what it looks for in a worker; where there is a `process` it gives up
const worker = { location: { href: "file:///engine_bundle.js" } };
Object.assign(globalThis, { self: worker, WorkerGlobalScope: Object, XMLHttpRequest, process: undefined });
console.log = console.warn = console.error;
vm.runInThisContext(read("engine_bundle.js").toString());

const write = (bytes) => { for (let at = 0; at < bytes.length;) at += fs.writeSync(1, bytes, at); };
const port = { postMessage: write };
worker.onmessage({ data: port });
setImmediate(() => port.onmessage({ data: new Uint8Array(fs.readFileSync(0)) }));
