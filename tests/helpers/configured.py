"""Process groups that are configured anew, as torchft's are, and others of classes that torch does not know."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from helpers.frameworks import dist


def mover(path: Path, rank: int, size: int) -> Any:
    """Return a group of torch's own that torch.distributed does not know, made over a file."""
    store = dist.FileStore(str(path), size)
    backend = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=20))
    group = dist.ProcessGroup(store, rank, size)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(dist.distributed_c10d.torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group


class Wrapper(dist.ProcessGroup):  # type: ignore[misc]
    """What torchft's wrappers are: rank 0 of 1 to torch, and over what moves the bytes."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        self._pg: Any = None
        self._quorum_id: int | None = None

    def size(self) -> int:
        assert self._pg is not None, "process group not initialized"
        size: int = self._pg.size()
        return size

    def configure(self, path: Path, rank: int, size: int, quorum: int | None = None) -> None:
        self._quorum_id = quorum
        if self._pg is not None:
            self._pg.abort()
        self._pg = None
        self._pg = mover(path, rank, size)


class Unnumbered(Wrapper):
    """One that does not say which quorum it is of: what it wraps tells."""

    def configure(self, path: Path, rank: int, size: int, _: int | None = None) -> None:
        super().configure(path, rank, size)


class Silent(dist.ProcessGroup):  # type: ignore[misc]
    """A group of one's own, which can be given other ranks, and does not tell."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        self.now: Any = None

    def configure(self, path: Path, rank: int, size: int, _: int | None = None) -> None:
        self.now = mover(path, rank, size)

    def rank(self) -> int:
        rank: int = self.now.rank()
        return rank

    def size(self) -> int:
        size: int = self.now.size()
        return size

    def send(self, tensors: list[Any], peer: int, tag: int) -> Any:
        return self.now.send(tensors, peer, tag)

    def recv(self, tensors: list[Any], peer: int, tag: int) -> Any:
        return self.now.recv(tensors, peer, tag)


class Outer(dist.ProcessGroup):  # type: ignore[misc]
    """A wrapper around a group that does not tell."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        self._pg = Silent()

    def configure(self, path: Path, rank: int, size: int, _: int | None = None) -> None:
        self._pg.configure(path, rank, size)

    def size(self) -> int:
        return self._pg.size()


class Untagged(Silent):
    """One that does not look at tags, as torchcomms."""

    def send(self, tensors: list[Any], peer: int, tag: int) -> Any:
        return super().send(tensors, peer, 0)

    def recv(self, tensors: list[Any], peer: int, tag: int) -> Any:
        return super().recv(tensors, peer, 0)


class Elsewhere(Silent):
    """One that receives into memory of its own, as torchft's ProcessGroupBabyGloo."""

    def recv(self, tensors: list[Any], peer: int, tag: int) -> Any:
        return super().recv([tensor.clone() for tensor in tensors], peer, tag)


class Baby(dist.ProcessGroup):  # type: ignore[misc]
    """One of which every rank says that it is rank 0, as torchft's ProcessGroupBaby."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def configure(self, *_: Any) -> None:
        """Do nothing."""

    def size(self) -> int:
        return 3
