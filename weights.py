"""Weights that others released: open the file, map it into memory, account for every tensor."""

import json
import os
import zipfile

import torch
from safetensors.torch import load_file


def open_weights(path):
    """A folder with config.json and model.safetensors, or a .safetensors, .pt or .pth file of tensors by name.

    Returns:
        the config, {} if there is none, and a function that maps the file into memory: dict of tensors. Dropping the
        dict unmaps it.
    """
    path = os.fspath(path)
    file, config = path, os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    if os.path.isdir(path):
        file = os.path.join(path, "model.safetensors")
        if not (os.path.isfile(config) and os.path.isfile(file)):
            raise ValueError(f"{path}: not a released folder, which holds config.json and model.safetensors")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{path}: no such file or folder")

    def read():
        try:
            found = load_file(file) if file.endswith(".safetensors") else torch.load(file, "cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        except Exception as error:                              # whatever a broken file makes the readers raise
            raise ValueError(f"{file}: cannot be read as weights: damaged, or more than tensors ({type(error).__name__})") from None
        if not (isinstance(found, dict) and found and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items())):
            raise ValueError(f"{file}: not a state dict (tensors by name)")
        return found

    try:
        with open(config) as f:
            settings = json.load(f)
    except OSError:
        settings = {}
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{config}: not a JSON object")
    return settings, read


def fill(model, read, path, skip=()):
    """Copy a checkpoint into a model on the meta device, every tensor accounted for by name and shape.

    The model gets memory after all checks have passed, and none if the default device is meta: then only the checks are
    made. The file is mapped anew for every few tensors, so that the pages of those already read do not stay: the peak is
    about the model itself.

    Returns:
        how many parameters were loaded, and how many skipped: those with a string of `skip` in their names.
    """
    theirs = {k: v.shape for k, v in read().items()}
    skipped = [k for k in theirs if any(s in k for s in skip)]
    mine = {k: v.shape for k, v in model.state_dict().items()}
    problems = {"missing": [k for k in mine if k not in theirs],
                "unexpected": [k for k in theirs if k not in mine and k not in skipped],
                "of another shape": [f"{k} {tuple(theirs[k])} instead of {tuple(mine[k])}" for k in mine
                                     if k in theirs and theirs[k] != mine[k]]}
    if any(problems.values()):
        raise ValueError(f"{path}: " + "; ".join(f"{len(v)} tensors {k}, e.g. {v[0]}" for k, v in problems.items() if v))
    target, names = model.to_empty(device=torch.get_default_device()).state_dict(), list(mine)
    for i in range(0, len(names), 8):
        part = read()
        for k in names[i:i + 8]:
            target[k].copy_(part[k])
    count = lambda keys: sum(theirs[k].numel() for k in keys)
    return count(mine), count(skipped)
