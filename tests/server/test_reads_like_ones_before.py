"""ComputeGradients requests that are like one before are cut into parts: they are answered as those that are parsed."""

from __future__ import annotations

from gradwire_proto import codec
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, Limits, TensorData
from gradwire_server.read_requests import ReadRequests

LIMITS = Limits()


def tensor(shape: tuple[int, ...], fill: int, dtype: str = "float32") -> TensorData:
    nbytes = TensorData(dtype, shape, b"").nbytes
    return TensorData(dtype, shape, bytes((fill + each) % 2 for each in range(nbytes)))


def request(batch: Batch, **fields) -> pb.ComputeGradientsRequest:
    made = pb.ComputeGradientsRequest(name="models/m", **fields)
    codec.encode_batch(batch, made.batch)
    return made


def batch(fill: int, rows: int = 4) -> Batch:
    return Batch({"x": tensor((rows, 8), fill), "scale": 3}, tensor((rows,), fill, "int64"))


def taught(made: pb.ComputeGradientsRequest, times: int = 2) -> ReadRequests:
    requests = ReadRequests(LIMITS)
    for _ in range(times):
        requests.learn(made, made.SerializeToString())
    return requests


def test_a_request_like_two_before_gives_what_its_message_says():
    fields = {"wrt": ["0.*"], "eval_mode": True, "seed": 5, "top_k": 0.5, "max_inline_bytes": 100}
    for first, other in ((batch(0), batch(1)), (batch(0, rows=2000), batch(1, rows=2000))):
        made = request(other, **fields)
        read = taught(request(first, **fields)).read(made.SerializeToString())
        assert read is not None
        assert read.name == "models/m"
        assert read.batch == codec.decode_batch(made.batch, "batch", LIMITS) == other
        assert read.query == codec.decode_gradient_query(made)
        assert read.max_inline_bytes == 100


def test_what_differs_in_more_than_bytes_of_tensors_is_parsed():
    requests = taught(request(batch(0), seed=5))
    assert requests.read(request(batch(1), seed=5).SerializeToString()) is not None
    for other in (
        request(batch(1), seed=6),
        request(batch(1), outputs=True),
        request(batch(1, rows=5), seed=5),
        request(Batch({"x": tensor((8, 4), 1), "scale": 3}, tensor((4,), 1, "int64")), seed=5),
    ):
        assert requests.read(other.SerializeToString()) is None


def test_requests_whose_bytes_are_looked_at_or_that_came_once_are_parsed():
    once = request(batch(0))
    assert taught(once, times=1).read(once.SerializeToString()) is None
    with_vectors = request(batch(0))
    codec.encode_named_tensors({"w": tensor((4,), 0)}, with_vectors.vectors)
    with_bool = request(Batch(tensor((4, 8), 0, "bool")))
    with_few = request(Batch(tensor((2,), 0)))
    of_function = request(batch(0))
    of_function.function.SetInParent()
    for made in (with_vectors, with_bool, with_few, of_function):
        assert taught(made).read(made.SerializeToString()) is None
