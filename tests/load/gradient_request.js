// The request that k6_gradients.js sends, as the JSON form of gradwire.v1.ComputeGradientsRequest. Needs nothing of k6.

export const SERVICE = "gradwire.v1.GradientService";
export const METHOD = "ComputeGradients";

// A batch of random rows for a model of float32[rows, features] -> float32[rows, classes] and labels int64[rows].
// encode: bytes (ArrayBuffer) -> base64.
export function gradientRequest({ model, rows, features, classes, encode }) {
  const inputs = new Float32Array(rows * features).map(() => Math.random() * 2 - 1);
  const targets = new DataView(new ArrayBuffer(8 * rows));
  for (let row = 0; row < rows; row++) {
    // Little-endian; labels are small, so that the upper half stays 0.
    targets.setUint32(8 * row, Math.floor(Math.random() * classes), true);
  }
  return {
    name: `models/${model}`,
    batch: {
      inputs: { tensor: { dtype: "DTYPE_FLOAT32", shape: [rows, features], data: encode(inputs.buffer) } },
      targets: { tensor: { dtype: "DTYPE_INT64", shape: [rows], data: encode(targets.buffer) } },
    },
  };
}
