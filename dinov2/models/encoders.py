"""Anyone's encoder, named as `module:function`: what the function must give, and the one line where it does not."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch
from torch import nn

from dinov2.configs.errors import nearest
from dinov2.errors import BadInput, is_out_of_memory
from dinov2.models.backbone import Backbone, BackboneModule
from dinov2.models.weights import StateDict, refuse_non_finite

_WANTED = ("embed_dim", "patch_size", "num_layers", "num_prefix_tokens", "input_size", "get_intermediate_layers")


def build_encoder(name: str, state: StateDict, source: str | Path) -> BackboneModule:
    """Call `function(state)` of `module`, which returns an `nn.Module` that is a `Backbone`.

    The module is looked for where Python looks, and in the working folder. Its code is run, so that a name is only ever taken
    from a command line.

    Args:
        name: `module:function`.
        state: Tensors of the weights, names as saved; empty for an untrained network.
        source: Of the weights; named in messages.

    Raises:
        BadInput: No such module or function, it refuses the weights, or what it returns is no backbone.
    """
    module_name, _, function_name = name.partition(":")
    refuse_non_finite(state, f"weights {source}")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as err:
        raise BadInput(f"{name}: {module_name} cannot be imported ({err}): install it, or start where its file is") from err
    finally:
        sys.path.remove(folder)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise BadInput(f"{name}: {module_name} has no function {function_name}{nearest(function_name, vars(module))}")
    try:
        encoder = function(dict(state))
    except BadInput as err:
        raise BadInput(f"{name}: does not take weights {source}: {err}") from err
    except (RuntimeError, ValueError, KeyError, TypeError) as err:
        if is_out_of_memory(err) or isinstance(err, torch.OutOfMemoryError):  # no fault of the weights
            raise
        reason = " ".join(str(err).split())[:160]
        raise BadInput(f"{name}: does not take weights {source} ({type(err).__name__}: {reason})") from err
    if not isinstance(encoder, nn.Module):
        raise BadInput(f"{name}: returned a {type(encoder).__name__}, expected an nn.Module with {', '.join(_WANTED)}")
    if not isinstance(encoder, Backbone):
        missing = [a for a in _WANTED if not hasattr(encoder, a)]
        raise BadInput(f"{name}: its network has no {', '.join(missing)} (dinov2.models.Backbone says what each is)")
    return encoder
