"""Streams of steps: what is sent when, what comes back, and what becomes of steps whose stream breaks."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from client.one_model import RESULT, batch, net

import gradwire
from gradwire import optim
from gradwire.errors import (
    Cancelled,
    DeadlineExceeded,
    Interrupted,
    InvalidArgument,
    ModelNotFound,
    ResourceExhausted,
    Unavailable,
)
from gradwire_proto import codec
from gradwire_proto.errors import FailedPrecondition
from gradwire_proto.status import to_status
from gradwire_proto.tensors import from_any
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2


class Steps:
    """Answers streams of steps, and steps alone, as a service does that applies each id once.

    `messages` holds how many steps each message brought. refuse: errors by the number of a step, the first time.
    gate: while it is cleared, nothing is answered. cut_after: a stream breaks behind so many messages.
    """

    def __init__(self, scripted) -> None:
        self.applied: dict[str, int] = {}
        self.seen: list[str] = []
        self.messages: list[int] = []
        self.alone: list[str] = []
        self.refuse: dict[int, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.cut_after: int | None = None
        self._lock = threading.Lock()
        scripted.answers |= {"TrainSteps": self.stream, "TrainStep": self.step}

    def outcome(self, request: pb.TrainStepRequest) -> pb.TrainStepsOutcome:
        with self._lock:
            if request.request_id not in self.seen:
                self.seen.append(request.request_id)
                refusal = self.refuse.pop(len(self.seen), None)
                if refusal is not None:
                    self.seen.pop()
                    return pb.TrainStepsOutcome(error=to_status(refusal))
            step = self.applied.setdefault(request.request_id, len(self.applied) + 1)
        result = codec.encode_step_result(RESULT)
        result.step = step
        return pb.TrainStepsOutcome(result=result)

    def step(self, request, context):
        self.alone.append(request.request_id)
        outcome = self.outcome(request)
        assert outcome.HasField("result")
        return pb.TrainStepResponse(result=outcome.result)

    def stream(self, messages, context):
        is_refused = False
        for message in messages:
            self.messages.append(len(message.steps))
            assert self.gate.wait(10)
            outcomes = []
            for request in message.steps:
                behind = FailedPrecondition("behind", reason="STEP_BEFORE_REFUSED", retryable=True)
                outcome = pb.TrainStepsOutcome(error=to_status(behind)) if is_refused else self.outcome(request)
                is_refused |= outcome.HasField("error")
                outcomes.append(outcome)
            if self.cut_after is not None and len(self.messages) >= self.cut_after:
                self.cut_after = None
                raise Unavailable("cut", reason="CONNECTION_LOST")
            yield pb.TrainStepsResponse(outcomes=outcomes)


@pytest.fixture
def steps(scripted, model):
    return Steps(scripted)


def test_steps_that_wait_for_each_other_are_packed_and_results_come_in_order(model, steps):
    results = list(model.train_steps([batch() for _ in range(20)], in_flight=8))
    assert [result.step for result in results] == list(range(1, 21))
    assert sum(steps.messages) == 20 and steps.messages[0] == 8 and not steps.alone


def test_the_iterable_is_not_advanced_beyond_what_is_in_flight(model, steps):
    steps.gate.clear()
    taken = []

    def batches():
        while True:
            taken.append(None)
            yield batch()

    results = model.train_steps(batches(), in_flight=3)
    assert not taken, "nothing happens before the first result is asked for"
    first = threading.Thread(target=lambda: next(results))
    first.start()
    time.sleep(0.2)
    assert len(taken) == 3
    steps.gate.set()
    first.join(5)
    results.close()
    assert len(steps.applied) == len(taken)


def test_a_batch_that_is_changed_after_it_was_sent_was_read_before(model, steps, scripted):
    x, y = torch.zeros(6, 3), torch.zeros(6, dtype=torch.int64)
    received = []
    answer = steps.outcome
    steps.outcome = lambda request: (
        received.append(codec.decode_batch(request.batch, "batch").inputs.data) or answer(request)
    )

    def batches():
        for value in range(6):
            x.fill_(value)
            yield x, y

    list(model.train_steps(batches(), in_flight=6))
    assert [torch.frombuffer(bytearray(each), dtype=torch.float32)[0].item() for each in received] == [0, 1, 2, 3, 4, 5]


def test_batches_of_any_kind_are_read_as_train_step_reads_them(model, steps):
    x, y = batch()
    kinds = [
        (x, y),
        (x.clone(), y.clone()),
        (x.t().contiguous().t(), y),
        (torch.complex(x, x).conj().imag, y),
        (x.numpy(), y.numpy()),
        (x.requires_grad_(), y),
        (x.clone(), y.clone()),
    ]
    received = []
    answer = steps.outcome
    steps.outcome = lambda request: received.append(request.batch.inputs.tensor.data) or answer(request)
    list(model.train_steps(kinds))
    wanted = [from_any(torch.as_tensor(each).resolve_neg()).data for each, _ in kinds]
    assert received == list(map(bytes, wanted))
    for wrong in (x.detach().to_sparse(), "text"):
        with pytest.raises(InvalidArgument):
            list(model.train_steps([(wrong, y)]))


def test_the_error_of_a_step_comes_after_the_results_of_those_before(model, steps):
    steps.refuse[3] = InvalidArgument("no", field="batch.targets", reason="TARGET_OUT_OF_RANGE")
    found = []
    with pytest.raises(InvalidArgument) as caught:
        found.extend(result.step for result in model.train_steps([batch() for _ in range(9)]))
    assert found == [1, 2] and (caught.value.reason, caught.value.outcome) == ("TARGET_OUT_OF_RANGE", "not_applied")
    assert len(steps.applied) == 2


def test_a_step_that_can_be_tried_again_is_and_those_behind_it_go_on(model, steps):
    steps.refuse[3] = ResourceExhausted("full", reason="QUEUE_FULL", retryable=True, retry_after=0.01)
    results = list(model.train_steps([batch() for _ in range(9)]))
    assert [result.step for result in results] == list(range(1, 10))
    assert len(steps.alone) == 1


def test_steps_whose_stream_broke_are_sent_again_under_their_ids(model, steps):
    steps.cut_after = 2
    results = list(model.train_steps([batch() for _ in range(30)], in_flight=4))
    assert [result.step for result in results] == list(range(1, 31))
    assert len(steps.seen) == len(steps.applied) == 30


def test_what_the_iterable_raises_comes_last(model, steps):
    def broken():
        yield batch()
        yield batch()
        raise KeyError("gone")

    found = []
    with pytest.raises(KeyError, match="gone"):
        found.extend(result.step for result in model.train_steps(broken()))
    assert found == [1, 2]


def test_a_batch_that_cannot_be_sent_comes_last(model, steps):
    found = []
    with pytest.raises(InvalidArgument) as caught:
        found.extend(result.step for result in model.train_steps([batch(), (torch.randn(6, 3), "label"), batch()]))
    assert found == [1] and caught.value.field == "batch.targets"
    with pytest.raises(InvalidArgument, match="pairs of inputs and targets"):
        list(model.train_steps([torch.randn(6, 3)]))


def test_a_batch_that_is_none_is_no_end_of_the_data(model, steps):
    found = []
    with pytest.raises(InvalidArgument, match="pairs of inputs and targets"):
        found.extend(result.step for result in model.train_steps([batch(), None, batch()]))
    assert found == [1]


@pytest.mark.parametrize("call", ["train_step", "zero_grad", "futures"])
def test_a_call_from_the_body_comes_behind_all_steps_that_were_sent(model, steps, scripted, call):
    sent, seen = [], []
    calls = {
        "train_step": lambda: seen.append(model.train_step(*batch()).step - 1),
        "zero_grad": model.zero_grad,
        "futures": lambda: model.futures.zero_grad().result(5),
    }
    scripted.answers["ZeroGrad"] = lambda request, context: seen.append(len(steps.applied)) or pb.ZeroGradResponse()

    def batches():
        for _ in range(30):
            sent.append(None)
            yield batch()

    expected, most = [], 0
    for number, _ in enumerate(model.train_steps(batches(), in_flight=6), start=1):
        expected.append(len(sent) + (len(expected) if call == "train_step" else 0))
        most = max(most, len(sent) - number)
        calls[call]()
    assert seen == expected and len(seen) == 30
    assert most <= 2 * 6, "results that wait for the loop do not pile up"


@pytest.mark.parametrize("call", ["train_step", "zero_grad"])
def test_a_future_made_in_the_body_comes_before_the_steps_that_are_not_sent_yet(model, steps, scripted, call):
    sent, seen, futures = [], [], []

    def note(request, context):
        time.sleep(0.02)
        seen.append(len(steps.applied))
        return pb.ZeroGradResponse()

    scripted.answers["ZeroGrad"] = note

    def batches():
        for _ in range(30):
            sent.append(None)
            yield batch()

    expected = []
    for _ in model.train_steps(batches(), in_flight=6):
        expected.append(len(sent) + (len(futures) if call == "train_step" else 0))
        futures.append(getattr(model.futures, call)(*(batch() if call == "train_step" else ())))
    results = [future.result(5) for future in futures]
    if call == "train_step":
        seen = [result.step - 1 for result in results]
    assert seen == expected and len(seen) == 30


@pytest.mark.parametrize("outcome", ["applied", "unknown"])
def test_ctrl_c_while_a_result_is_waited_for_tells_how_many_steps_were_applied(model, steps, scripted, outcome):
    begun = threading.Event()
    asked = []

    def slow(messages, context):
        for number, message in enumerate(messages):
            applied = [steps.outcome(request) for request in message.steps[: 1 if number else None]]
            if number:
                # The first of this message is applied, and nobody hears of it.
                begun.set()
                context.add_callback(over.set)
                over.wait(10)
                return
            yield pb.TrainStepsResponse(outcomes=applied)

    def command(request, context):
        asked.append(request.wait)
        if outcome == "unknown":
            raise FailedPrecondition("nobody knows", reason="UNKNOWN")
        if request.name.rpartition("/")[2] not in steps.applied:
            raise ModelNotFound("none", reason="COMMAND_NOT_FOUND")
        return model_pb2.Command(name=request.name, state=model_pb2.COMMAND_STATE_APPLIED)

    over = threading.Event()
    scripted.answers |= {"TrainSteps": slow, "GetCommand": command}
    found = []

    def interrupt():
        assert begun.wait(10)
        while len(found) < 3:
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    results = model.train_steps([batch() for _ in range(9)], in_flight=3)
    with pytest.raises(Interrupted) as caught:
        found.extend(result.step for result in results)
    known = 3 if outcome == "unknown" else 4
    words = "at least 3 steps were applied, 0" if outcome == "unknown" else "4 steps were applied, 1"
    assert found == [1, 2, 3] and f"{words} of them behind the last result" in str(caught.value)
    assert caught.value.outcome == outcome and known <= len(steps.applied) == 4
    assert over.wait(5), "what was not begun is given up"


def test_a_step_that_is_refused_while_the_body_waits_ends_the_training_after_the_results_before(model, steps, scripted):
    scripted.answers["ZeroGrad"] = lambda request, context: pb.ZeroGradResponse()
    steps.refuse[4] = InvalidArgument("no", field="batch", reason="NO")
    found = []

    def train() -> None:
        for result in model.train_steps([batch() for _ in range(9)], in_flight=6):
            found.append(result.step)
            model.zero_grad()

    with pytest.raises(InvalidArgument):
        train()
    assert found == [1, 2, 3] and len(steps.applied) == 3


def test_a_call_of_another_thread_does_not_wait_for_the_loop(model, steps, scripted):
    scripted.answers["ZeroGrad"] = lambda request, context: pb.ZeroGradResponse()
    results = model.train_steps([batch() for _ in range(9)], in_flight=2)
    next(results)
    steps.gate.clear()
    other = threading.Thread(target=model.zero_grad)
    other.start()
    other.join(5)
    assert not other.is_alive()
    steps.gate.set()
    assert len(list(results)) == 8


@pytest.mark.parametrize(("in_flight", "reason"), [(0, "NUMBER_OUT_OF_RANGE"), (None, "ARGUMENT_TYPE_INVALID")])
def test_arguments_are_checked_at_once(model, in_flight, reason):
    with pytest.raises(InvalidArgument) as caught:
        model.train_steps([], in_flight=in_flight)
    assert (caught.value.field, caught.value.reason) == ("in_flight", reason)


def test_another_variant_is_added_when_those_before_are_answered(model, steps, scripted, hosted):
    added = []
    scripted.answers["AddVariant"] = lambda request, context: (
        added.append(len(steps.applied)) or codec.encode_model_info(hosted.info)
    )
    batches = [batch(), batch(), (torch.randn(2, 4, 3), torch.randint(0, 2, (2, 3))), batch()]
    with pytest.raises(InvalidArgument):  # The module takes no such batch; those before it are done when that is known.
        list(model.train_steps(batches))
    assert len(steps.applied) == 2 and not added


def test_a_step_refused_ahead_of_another_variant_ends_the_training_as_any_other(model, steps):
    steps.refuse[3] = InvalidArgument("no", field="batch.targets", reason="TARGET_OUT_OF_RANGE")
    batches = [batch(), batch(), batch(), batch(), (torch.randn(2, 4, 3), torch.randint(0, 2, (2, 3)))]
    found = []
    with pytest.raises(InvalidArgument) as caught:
        found.extend(result.step for result in model.train_steps(batches))
    assert found == [1, 2] and (caught.value.reason, caught.value.outcome) == ("TARGET_OUT_OF_RANGE", "not_applied")


def test_no_result_is_waited_for_longer_than_the_timeout(scripted, hosted, start_scripted):
    with gradwire.connect(scripted.target, timeout=0.6) as sdk:
        made = sdk.create_model(net(), loss="cross_entropy", optimizer=optim.SGD(lr=0.5), example=batch())
        steps = Steps(scripted)
        steps.gate.clear()
        scripted.answers["TrainStep"] = lambda request, context: time.sleep(1) or pb.TrainStepResponse()
        scripted.answers["GetCommand"] = lambda request, context: (_ for _ in ()).throw(RuntimeError)
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            next(made.train_steps([batch()]))
        assert time.monotonic() - start < 3
        steps.gate.set()


def test_no_future_is_waited_for_longer_because_others_are_submitted(scripted, hosted):
    with gradwire.connect(scripted.target, timeout=0.6) as sdk:
        made = sdk.create_model(net(), loss="cross_entropy", optimizer=optim.SGD(lr=0.5), example=batch())
        steps = Steps(scripted)
        steps.gate.clear()
        first = made.futures.train_step(*batch())
        start = time.monotonic()
        while not first.done() and time.monotonic() - start < 5:
            made.futures.train_step(*batch())
            time.sleep(0.05)
        steps.gate.set()
        assert first.done() and steps.alone, "settled alone, as its stream stood still"


def test_a_step_whose_service_died_with_it_may_have_been_applied(scripted, hosted):
    with gradwire.connect(scripted.target, timeout=1.5) as sdk:
        made = sdk.create_model(net(), loss="cross_entropy", optimizer=optim.SGD(lr=0.5), example=batch())
        steps = Steps(scripted)
        answer = steps.outcome

        def apply_and_die(request):
            outcome = answer(request)
            threading.Thread(target=scripted.stop, daemon=True).start()
            time.sleep(0.3)
            return outcome

        steps.outcome = apply_and_die
        with pytest.raises(Unavailable) as caught:
            next(made.train_steps([batch()]))
        assert len(steps.applied) == 1 and caught.value.outcome == "unknown"


def test_a_future_that_a_closed_client_gives_up_may_have_been_applied(scripted, hosted):
    sdk = gradwire.connect(scripted.target, timeout=5)
    made = sdk.create_model(net(), loss="cross_entropy", optimizer=optim.SGD(lr=0.5), example=batch())
    steps = Steps(scripted)
    steps.gate.clear()
    future = made.futures.train_step(*batch())
    while not steps.messages:
        time.sleep(0.01)
    sdk.close()
    with pytest.raises(Cancelled) as caught:
        future.result(5)
    steps.gate.set()
    assert caught.value.outcome == "unknown"


def test_futures_share_a_stream_and_each_has_its_own_result(model, steps):
    steps.gate.clear()
    futures = [model.futures.train_step(*batch()) for _ in range(12)]
    time.sleep(0.2)
    steps.gate.set()
    assert [future.result(5).step for future in futures] == list(range(1, 13))
    assert len(steps.messages) < 12 and not steps.alone


def test_a_future_whose_step_is_refused_does_not_keep_those_behind_it(model, steps):
    steps.refuse[2] = InvalidArgument("no", field="batch", reason="NO")
    futures = [model.futures.train_step(*batch()) for _ in range(5)]
    assert [future.result(5).step for future in (futures[0], *futures[2:])] == [1, 2, 3, 4]
    with pytest.raises(InvalidArgument):
        futures[1].result(5)


def test_other_calls_keep_their_place_among_futures_of_steps(model, steps, scripted):
    seen = []
    scripted.answers["ZeroGrad"] = lambda request, context: seen.append(len(steps.applied)) or pb.ZeroGradResponse()
    for _ in range(4):
        model.futures.train_step(*batch())
    zero = model.futures.zero_grad()
    last = model.futures.train_step(*batch())
    zero.result(5)
    assert last.result(5).step == 5 and seen == [4]
    model.futures.train_step(*batch())
    model.zero_grad()
    assert seen == [4, 6]


def test_a_future_is_sent_while_those_before_it_are_on_their_way(model, steps, scripted):
    arrived = threading.Event()

    def both_at_once(messages, context):
        first = next(messages)
        arrived.set()
        requests = [*first.steps, *next(messages).steps]
        yield pb.TrainStepsResponse(outcomes=[steps.outcome(request) for request in requests])

    scripted.answers["TrainSteps"] = both_at_once
    one = model.futures.train_step(*batch())
    assert arrived.wait(5)
    two = model.futures.train_step(*batch())
    assert (one.result(3).step, two.result(3).step) == (1, 2)
