"""A rank in a process of its own, without Ray: makes a Trainer and carries out what the test says over a socket."""

import os
import pickle
import sys
from multiprocessing.connection import Client

import torch

from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.trainer import Trainer

FAULTS = {}


def start(spec, state, rank, size, folder, generation, limits=None):
    groups = None if size == 1 else ProcessGroups.join(folder=folder, generation=generation, rank=rank, size=size)
    try:
        return Trainer(spec=spec, state=state, rank=rank, groups=groups)
    except BaseException:
        if groups is not None:
            groups.leave()
        raise


def main(address: str) -> None:
    torch.set_num_threads(1)
    connection = Client(address)
    trainer = None
    while True:
        try:
            name, arguments, keywords = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)  # as ranks end: gloo's threads survive no orderly exit of the interpreter
        try:
            if name == "start":
                if trainer is not None:
                    trainer.close()
                    trainer = None
                trainer = start(*arguments, **keywords)
                answer = None
            elif name == "run":  # a function of the trainer, as source: faults are set, and private state read, so
                scope = {"trainer": trainer, "torch": torch, "faults": FAULTS}
                exec(arguments[0], scope)
                answer = scope.get("result")
            elif name == "needs_rejoin":
                answer = trainer.needs_rejoin
            else:
                answer = getattr(trainer, name)(*arguments, **keywords)
            reply = ("ok", answer)
        except Exception as error:
            reply = ("error", error)
        connection.send_bytes(pickle.dumps(reply))


if __name__ == "__main__":
    main(sys.argv[1])
