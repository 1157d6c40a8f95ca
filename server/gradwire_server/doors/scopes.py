"""What each RPC needs of the token that comes with it. One that is not here cannot be served."""

from __future__ import annotations

from typing import Any

from gradwire_proto.token_file import SCOPES

READ, TRAIN, ADMIN = SCOPES

SCOPE_OF = {
    "CreateModel": TRAIN,
    "GetModel": READ,
    "ListModels": READ,
    "DeleteModel": TRAIN,
    "UpdateModel": TRAIN,
    "AddVariant": TRAIN,
    "GetCommand": READ,
    "TrainStep": TRAIN,
    "TrainSteps": TRAIN,
    "ForwardBackward": TRAIN,
    "OptimizerStep": TRAIN,
    "ZeroGrad": TRAIN,
    "LoadStateDict": TRAIN,
    "LoadOptimizerState": TRAIN,
    "Backward": TRAIN,
    "Release": TRAIN,
    "SetGradients": TRAIN,
    "ComputeGradients": READ,
    "DifferentiateFunction": READ,
    "Forward": READ,
    "GetGradients": READ,
    "GetStateDict": READ,
    "GetOptimizerState": READ,
    "CreateCheckpoint": TRAIN,
    "GetCheckpoint": READ,
    "ListCheckpoints": READ,
    "DeleteCheckpoint": TRAIN,
    "RestoreModel": TRAIN,
    "CreateDataset": TRAIN,
    "GetDataset": READ,
    "ListDatasets": READ,
    "DeleteDataset": TRAIN,
    "Fit": TRAIN,
    # What a read brings, and what it gives, may be too much for a message.
    "UploadTensors": READ,
    "DownloadTensors": READ,
    "GetServerInfo": READ,
}
"""By the RPC's name; see `scope_of` for those whose requests say more."""


def scope_of(method: str, request: Any) -> str:
    """What this request needs: of a forward, whether it changes the model, or keeps something in its ranks."""
    if method == "Forward" and (request.training or request.HasField("retain")):
        return TRAIN
    return SCOPE_OF[method]


def holds(scopes: frozenset[str], scope: str) -> bool:
    """Whether one of `scopes` is this one, or more."""
    return any(SCOPES.index(each) >= SCOPES.index(scope) for each in scopes)
