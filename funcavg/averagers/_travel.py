"""How a fragment's changes travel, where there is a delay: begun in one update, and waited for in a later one.

In a program of JAX's the two halves are two callbacks, which get arrays that are XLA's. Over axes and stacked replicas
the mean is taken when the fragment is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from funcavg._transforms import do_in_order
from funcavg._trees import Options, check_weight, flatten, is_dtensor, is_jax, wrap_local_tensor
from funcavg.averagers._base import is_local
from funcavg.averagers._flights import begin, is_under_way, land, turn_to
from funcavg.averagers._outer_step import has_tracers
from funcavg.averagers._packing import Form, pack, unpack

__all__ = ["Travel", "in_place_of", "kept_weight"]

Vectors = dict[str, Any]


@dataclass(frozen=True)
class Travel:
    """The way of one fragment."""

    who: str
    owner: object  # the averager
    group: Any
    options: Options  # about this fragment
    delay: int
    forms: Sequence[Form]  # of its leaves, none of which may be kept: programs are
    ties: Mapping[int, int]  # which of them are others again, and need not travel

    @property
    def title(self) -> str:
        """What is averaged, for the log."""
        return f"{self.who}, {self.options.about.partition(',')[0]}"

    def lost(self, sent: Vectors, kept: Any, step: int) -> bool:
        """Say whether it must be begun again, who was sent after a step: this is another process than then."""
        return not is_under_way(self.owner, list(sent.values()), self.group, self.options_at(kept, step))

    def begin(self, sent: Vectors, kept: Any, step: Any, *, traced: bool) -> Vectors:
        """Begin, in the update of this step. Return what is sent."""
        if traced:
            return self._in_a_program(self._begin_there, sent, kept, step)
        self._begin(sent, kept, step)
        return sent

    def land(self, sent: Vectors, kept: Any, step: Any, *, traced: bool) -> list[Any]:
        """Return the means of its leaves, in the update of this step."""
        if is_local(self.group):
            return self._pieces(sent)  # they are what has been sent
        if traced:
            return self._pieces(self._in_a_program(self._land_there, sent, kept, step))
        return self._land(sent, kept, step)

    def options_at(self, kept: Any, sent_at: int) -> Options:
        """Return what all ranks must ask for: the fragment of one step, each with the weight that it had then."""
        weight = None if math.isnan(kept) else float(kept)
        return replace(self.options, weight=weight, about=f"{self.options.about}, sent at step {sent_at}", aside=True)

    def _begin(self, sent: Vectors, kept: Any, step: Any) -> None:
        now = self.options_at(kept, int(step))
        begin(self.owner, list(sent.values()), self._readable(sent), self.group, now, self.who, int(step))

    def _land(self, sent: Vectors, kept: Any, step: Any) -> list[Any]:
        now = self.options_at(kept, int(step) - self.delay)
        what = f"{self.title}: step {int(step)}"
        return land(self.owner, list(sent.values()), self._readable(sent), self.group, now, what)

    def _readable(self, vectors: Vectors) -> list[Any]:
        """Return the pieces where a thread that calls no JAX can read them."""
        return self._pieces(
            {kind: np.asarray(vector) if is_jax(vector) else vector for kind, vector in vectors.items()}
        )

    def _pieces(self, vectors: Vectors) -> list[Any]:
        pieces = unpack(vectors, self.forms)
        return [pieces[self.ties.get(i, i)] for i in range(len(pieces))]

    def _in_a_program(self, do: Callable[..., Vectors], sent: Vectors, kept: Any, step: Any) -> Vectors:
        import jax

        kinds = list(sent)

        def there(arrays: Sequence[Any], weight: float) -> list[Any]:
            *vectors, now = arrays
            return [*do(dict(zip(kinds, vectors, strict=True)), weight, int(now)).values(), now]

        arrays = [*map(jax.numpy.asarray, sent.values()), jax.numpy.asarray(step, jax.numpy.int32)]
        return dict(zip(kinds, do_in_order(there, arrays, kept, self.who), strict=False))

    def _begin_there(self, sent: Vectors, kept: float, step: int) -> Vectors:
        turn_to(self.owner, self.group, step)
        own = {kind: np.array(vector) for kind, vector in sent.items()}
        self._begin(own, kept, step)
        return own

    def _land_there(self, sent: Vectors, kept: float, step: int) -> Vectors:
        turn_to(self.owner, self.group, step)
        return pack(self._land(sent, kept, step), sent)


def in_place_of(anchor: Any, means: Sequence[Any]) -> Any:
    """Return means that have come back as a tree like an anchor: of its kinds, and where it is."""
    flat = flatten(anchor)
    return flat.rebuild([_as(leaf, mean) for leaf, mean in zip(flat.leaves, means, strict=True)])


def _as(leaf: Any, value: Any) -> Any:
    if is_jax(leaf):
        import jax

        value = jax.numpy.asarray(value)
        if has_tracers((leaf, value)) or not leaf.committed:
            return value
        return jax.device_put(value, leaf.sharding)
    if is_dtensor(leaf):
        return wrap_local_tensor(leaf, value.to(leaf.device))
    if hasattr(value, "to") and hasattr(leaf, "device"):
        return value.to(leaf.device)
    if isinstance(leaf, np.ndarray):
        return value if has_tracers(value) else np.asarray(value, leaf.dtype)
    return type(leaf)(value[()])


def kept_weight(weight: Any, before: Any) -> Any:
    """Return a weight as a state keeps it, NaN if there is none; or raise what is wrong with it.

    It is rounded to float32: files and programs of JAX's may do that to it, and the run is to have the same bits.
    """
    if has_tracers((weight, before)):
        import jax

        numpy = jax.numpy
        if has_tracers(weight):  # -1 is refused by all ranks, once it is sent
            rounded = numpy.asarray(weight, np.float32)
            kept = numpy.where(numpy.isnan(rounded) | ((rounded == 0) & (weight != 0)), -1, rounded)
        else:
            kept = numpy.asarray(_rounded(weight), np.float32)
        return kept.astype(getattr(before, "dtype", float))
    return _rounded(weight)


def _rounded(weight: Any) -> float:
    if weight is None:
        return np.nan
    number = check_weight(weight)
    with np.errstate(all="ignore"):
        kept = float(np.float32(number))
    if math.isinf(kept) or (number and kept < np.finfo(np.float32).tiny):
        raise ValueError(
            f"weight is kept as a float32 while a fragment travels, so it must be 0, or from 1.2e-38 to 3.4e38, got "
            f"{weight!r}. Only ratios count: scale the weights of all ranks."
        )
    return kept
