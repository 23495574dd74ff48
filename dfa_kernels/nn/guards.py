"""Warnings about what does not train, or trains otherwise than asked. Each is given once."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence

import torch

# What a warning points at is the first caller outside these folders.
_INSIDE = (
    *(
        os.path.dirname(sys.modules[name].__file__ or "") + os.sep
        for name in ("torch", "dfa_kernels")
    ),
    "<eval_with_key>",  # code that torch.fx made
)
_said_while_tracing: set[str] = set()


def warn_once(said: set[str], fact: str, message: str) -> None:
    """Warn of `fact` unless it is in `said`, which remembers it.

    While torch.compile traces, each message is given once in the process, and is a constant.
    """
    if torch.compiler.is_compiling():
        _warn_while_tracing(message)
    elif fact not in said:
        said.add(fact)
        warnings.warn(message, UserWarning, stacklevel=_level())


def warn_of_a_layer_alone(said: set[str], name: str | None) -> None:
    """A `DFALayer` was called that no `DFA` trains."""
    which = "this layer" if name is None else f"layer {name!r}"
    warn_once(
        said,
        "alone",
        f"DFALayer: no DFA trains {which}, so nothing trains what is before it; give it to one, as "
        "in DFA([layer, ...]), or use passthrough=True to let backpropagation through",
    )


def warn_of_a_second_call(said: set[str], layer: int) -> None:
    """A layer was called again before the output, and nobody chose what to do then."""
    warn_once(
        said,
        "second call",
        f"DFA: dfa_layers[{layer}] was called again before the DFA, so only its last call will be "
        "trained. If one forward pass calls it several times, as a shared activation module, set "
        'feedback_points_handling="REDUCE" to train all calls, or "LAST" to train the last. If '
        "another pass began before this one reached the DFA, nothing trained what that one "
        "called: an exception stopped it (watch(model) drops what it left), or something "
        "called the model's forward without its hooks",
    )


def warn_of_a_pass_without_hooks(said: set[str]) -> None:
    """A point was called while the model was not, whose output is what the DFA gets."""
    warn_once(
        said,
        "no hooks",
        "DFA: a point was called outside a call of the model, so nothing trains what is before it: "
        "call model(x), not model.forward(x) nor a graph that was traced from it",
    )


def warn_of_an_unwatched_sharded_model(said: set[str]) -> None:
    """fully_shard is in use, and the DFA knows no model whose sharded modules it could reach."""
    warn_once(
        said,
        "unwatched",
        "DFA: fully_shard is in use and watch(model) was not called, so layers pass on activations "
        "that require a gradient, which costs a product in each; call dfa.watch(model)",
    )


def warn_of_another_matrix() -> None:
    """The feedback matrix was changed after match_output_."""
    warn_once(
        set(),
        "another matrix",
        "DFA: the output layer was set from another feedback matrix than the one now in force; "
        "call match_output_ again",
    )


def warn_of_waiting(said: set[str], layers: Sequence[int]) -> None:
    """A forward pass ended with layers that wait for the output."""
    warn_once(
        said,
        "waiting",
        f"DFA: dfa_layers {list(layers)} were called after the DFA, or it was not called; nothing "
        "trains what is before them",
    )


def warn_of_layers_without_signals(
    said: set[str], idle: Mapping[int, str], uncalled: Sequence[int], waiting: int
) -> None:
    """A training pass reached the output, and some layers will get no signal.

    `idle` has those that were called and why they wait for nothing, `uncalled` those that were
    never called so far, and `waiting` is the number of activations that wait.
    """
    frozen = [layer for layer, why in idle.items() if why == "frozen"]
    blind = [layer for layer, why in idle.items() if why == "no_grad"]
    if frozen:
        warn_once(
            said,
            "frozen",
            f"DFA: dfa_layers {frozen} got activations that require no gradient, so no signal "
            "trains what is between them and the layer before: it is frozen, or cut off, as by a "
            "checkpoint with use_reentrant=True whose input requires none (use "
            "use_reentrant=False, or requires_grad=True of DFA)",
        )
    if blind:
        warn_once(
            said,
            "no_grad",
            f"DFA: dfa_layers {blind} were called with gradients disabled, so nothing before them "
            "is trained; inside a checkpoint use use_reentrant=False",
        )
    if uncalled and (waiting or idle):
        warn_once(
            said,
            "uncalled",
            f"DFA: dfa_layers {list(uncalled)} were not called in this forward pass, nor before: "
            "what is before them is trained by the next layer's signal",
        )
    if not waiting and not idle:
        warn_once(
            said,
            "nothing",
            "DFA: no layer was called before it in this forward pass, so it trains nothing but the "
            "last layer. The DFA was called twice (linear_cross_entropy is such a call), or the "
            "layers' hooks were not called: call model(x), not model.forward(x), and choose points "
            "that are called as modules",
        )


def warn_of_an_end_without_point(said: set[str], stage: int) -> None:
    """A stage of a pipeline sends on what no signal of its own trains."""
    warn_once(
        said,
        "end",
        f"FeedbackStage: nothing trains what comes after the last point of stage {stage}, since "
        "no gradient comes from the next stage: end it with a point, as a DFALayer, or freeze it",
    )


def warn_of_whole_logits(said: set[str]) -> None:
    """A graph cannot take what makes the signals as a part of one node."""
    warn_once(
        said,
        "whole logits",
        "DFA.linear_cross_entropy: with an error_transform or a Source of your own torch.compile "
        "makes whole logits; call it uncompiled, or use a seed, stored matrices or OutputWeights "
        "of this output layer",
    )


def warn_of_a_whole_head(said: set[str], name: str) -> None:
    """The output layer made logits as ever, in a way that cannot wait for the loss."""
    warn_once(
        said,
        "whole head",
        f"attach: head {name!r} makes whole logits here, as with output=: only F.linear(input, "
        "weight, bias) of plain tensors can wait for the loss, and not in code that torch.compile "
        "compiles (compile the blocks, as by block.compile(), instead of the model), nor where "
        "fully_shard was called on the head itself",
    )


def warn_of_a_search_for_unused(said: set[str], name: str) -> None:
    """DistributedDataParallel needs the graph of logits whose loss is outside the model."""
    warn_once(
        said,
        "search for unused",
        f"attach: head {name!r}: DistributedDataParallel(find_unused_parameters=True) needs whole "
        "logits where the loss is outside the model; compute it inside, or use "
        "find_unused_parameters=False",
    )


def warn_of_a_left_out_bias(said: set[str]) -> None:
    """The output layer has a bias that its loss was not given."""
    warn_once(
        said,
        "bias",
        "DFA.linear_cross_entropy: the output layer of OutputWeights has a bias, and bias was not "
        "given, so the loss is without it and does not train it; give bias=linear.bias",
    )


def warn_of_looked_at_logits(said: set[str], name: str, function: str) -> None:
    """A function needs the numbers of logits, and may send them a gradient."""
    warn_once(
        said,
        f"whole logits of {function}",
        f"attach: head {name!r}: {function} needs whole logits here, so they are made and take "
        "their memory. They need not be where they reach F.cross_entropy with int64 targets and no "
        "class weights, after no more than .float(), other shapes, a selection of tokens, factors "
        "and c * tanh(x / c), and without hooks, as fully_shard puts them on a model's outputs "
        "(compute the loss inside it). For measures call it under torch.no_grad()",
    )


def warn_of_errors_apart(said: set[str], name: str) -> None:
    """A transform meets the errors of one pass one by one, as whole logits have them summed."""
    warn_once(
        said,
        "errors apart",
        f"attach: head {name!r}: the logits of a pass have a second loss, or are looked at after "
        "their loss, so error_transform and signal_transform get the error of each by itself, not "
        "the sum; give output= instead of head=",
    )


def warn_of_tokens(said: set[str]) -> None:
    """An output of three dimensions met the default `batch_dims`."""
    warn_once(
        said,
        "tokens",
        "DFA: output has three dimensions, and batch_dims is not given, so each sample is one row "
        "and all its tokens' numbers are the error of one row, which is slow. For [batch, tokens, "
        "n] give batch_dims=(0, 1), or batch_dims=(0,) if one row a sample is meant",
    )


@torch.compiler.assume_constant_result  # so it runs as it is while tracing
def _warn_while_tracing(message: str) -> None:
    if message not in _said_while_tracing:
        _said_while_tracing.add(message)
        warnings.warn(message, UserWarning, stacklevel=_level())


def _level() -> int:
    """The `stacklevel` of the first frame outside torch and this library, for the caller."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    return level
