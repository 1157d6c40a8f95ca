// Gradients at a steady rate, or as fast as so many clients get them, by k6:
// https://grafana.com/docs/k6/latest/javascript-api/k6-net-grpc/
//
//   k6 run -e TARGET=127.0.0.1:50051 -e MODEL=digits -e FEATURES=64 -e CLASSES=10 -e RATE=50 tests/load/k6_gradients.js
//
// The model takes float32[rows, FEATURES] and labels int64[rows], as the load test's own do. CLIENTS in place of RATE:
// clients with a connection each, of which each asks as soon as it was answered. Further settings: ROWS, SECONDS, P95 (ms, a threshold), TOKEN, TLS=1; PROTO_PATH, the folders (with commas) that hold gradwire_proto/ and
// google/api/: without it the service is asked for its contract (gRPC reflection).

import encoding from "k6/encoding";
import grpc from "k6/net/grpc";
import { check } from "k6";
import { Counter, Trend } from "k6/metrics";
import { METHOD, SERVICE, gradientRequest } from "./gradient_request.js";

const RATE = Number(__ENV.RATE || 50);
const FOLDERS = (__ENV.PROTO_PATH || "").split(",").filter(Boolean);

const DURATION = `${__ENV.SECONDS || 30}s`;

// Open loop: requests come whether or not the ones before were answered.
const AT_A_RATE = {
  executor: "constant-arrival-rate",
  rate: RATE,
  timeUnit: "1s",
  duration: DURATION,
  preAllocatedVUs: Math.max(10, RATE),
  maxVUs: 10 * Math.max(10, RATE),
};
const BY_CLIENTS = { executor: "constant-vus", vus: Number(__ENV.CLIENTS || 1), duration: DURATION };

export const options = {
  scenarios: { gradients: __ENV.CLIENTS ? BY_CLIENTS : AT_A_RATE },
  thresholds: {
    checks: ["rate>0.999"],
    grpc_req_duration: [`p(95)<${__ENV.P95 || 100}`],
    // What could not be sent in time would be missing from the latencies.
    dropped_iterations: ["count==0"],
  },
};

const queue = new Trend("gradwire_queue", true);
const compute = new Trend("gradwire_compute", true);
const allReduce = new Trend("gradwire_all_reduce", true);
const failures = new Counter("gradwire_errors");

const client = new grpc.Client();
if (FOLDERS.length) {
  client.load(FOLDERS, "gradwire_proto/v1/gradient_service.proto");
}

const request = gradientRequest({
  model: __ENV.MODEL,
  rows: Number(__ENV.ROWS || 32),
  features: Number(__ENV.FEATURES || 32),
  classes: Number(__ENV.CLASSES || 10),
  encode: (buffer) => encoding.b64encode(buffer),
});
const metadata = __ENV.TOKEN ? { authorization: `Bearer ${__ENV.TOKEN}` } : {};
let connected = false;

export default function () {
  if (!connected) {
    client.connect(__ENV.TARGET || "127.0.0.1:50051", { plaintext: !__ENV.TLS, reflect: !FOLDERS.length });
    connected = true;
  }
  const response = client.invoke(`${SERVICE}/${METHOD}`, request, { metadata, timeout: "30s" });
  const message = response.message;
  const answered = check(response, {
    "the status is OK": (reply) => reply.status === grpc.StatusOK,
    "there are gradients": () => Boolean(message && message.gradients && message.gradients.length),
  });
  if (answered) {
    // Seconds on the wire, milliseconds in k6.
    queue.add(1000 * message.timing.queue);
    compute.add(1000 * message.timing.compute);
    allReduce.add(1000 * message.timing.allReduce);
  } else {
    failures.add(1, { status: String(response.status) });
  }
}
