"""Weights that others released: open the file, map it into memory, account for every tensor."""

import contextlib
import json
import os
import zipfile

import torch
from safetensors.torch import load_file


def open_weights(path):
    """A released folder (config.json, model.safetensors), or a .safetensors, .pt or .pth file of tensors
    by name.

    Returns:
        the config, {} if there is none, and a function that maps the file into memory: dict of tensors.
        Dropping the dict unmaps it.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: a folder of another kind, or a config that is no JSON object.
    """
    path = os.fspath(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    config, file = os.path.join(folder, "config.json"), path
    if os.path.isdir(path):
        file = os.path.join(path, "model.safetensors")
        if not (os.path.isfile(config) and os.path.isfile(file)):
            raise ValueError(f"{path}: not a released folder, which holds config.json and model.safetensors")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{path}: no such file or folder")
    return read_config(config), lambda: read_tensors(file)


def read_config(file):
    """The JSON object in a file; {} if there is no file."""
    if not os.path.isfile(file):
        return {}
    with contextlib.suppress(ValueError), open(file) as f:
        settings = json.load(f)
        if isinstance(settings, dict):
            return settings
    raise ValueError(f"{file}: not a JSON object")


def read_tensors(file):
    """Map a file of tensors by name into memory; no pickled code runs. ValueError if it is something else."""
    try:
        if file.endswith(".safetensors"):
            found = load_file(file)
        else:
            found = torch.load(file, "cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:                  # whatever a broken file makes the readers raise
        raise ValueError(f"{file}: cannot be read as weights: damaged, or more than tensors "
                         f"({type(error).__name__})") from None
    tensors = isinstance(found, dict) and all(isinstance(v, torch.Tensor) for v in found.values())
    if not (tensors and found and all(isinstance(k, str) for k in found)):
        raise ValueError(f"{file}: not a state dict (tensors by name)")
    return found


def fill(model, read, path, skip=()):
    """Copy a checkpoint into a model on the meta device.

    The model gets memory after all checks have passed, and none if the default device is meta: then only
    the checks are made. The file is mapped anew for every few tensors, so that the pages of those already
    read do not stay: the peak is about the model itself.

    Args:
        read: the function that `open_weights` returns. path: only named in errors.
        skip: a tensor with one of these strings in its name is left out.

    Returns how many parameters were loaded, and how many skipped.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape, with counts and an example of
            each.
    """
    theirs = {name: tensor.shape for name, tensor in read().items()}
    mine = {name: tensor.shape for name, tensor in model.state_dict().items()}
    skipped = [name for name in theirs if any(s in name for s in skip)]
    shared = [name for name in mine if name in theirs]
    problems = {
        "missing": [name for name in mine if name not in theirs],
        "unexpected": [name for name in theirs if name not in mine and name not in skipped],
        "of another shape": [f"{name} {tuple(theirs[name])} instead of {tuple(mine[name])}"
                             for name in shared if theirs[name] != mine[name]],
    }
    found = [f"{len(names)} tensors {kind}, e.g. {names[0]}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{path}: {'; '.join(found)}")
    target = model.to_empty(device=torch.get_default_device()).state_dict()
    for i in range(0, len(shared), 8):
        tensors = read()
        for name in shared[i:i + 8]:
            target[name].copy_(tensors[name])
    return sum(mine[name].numel() for name in mine), sum(theirs[name].numel() for name in skipped)
