"""One thread at a time with a model, and states of a model that are always put back.

    with vlm.alone(): ...

A model's weights, hooks and settings are shared by all who hold it, so that whoever runs or changes it holds its lock,
from before the change until it is taken back. A state that a model is put into for a while is a generator under
`restored`: a signal (Ctrl-C) that comes while it is put on or taken off waits until that is done.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import CodeType, FrameType, TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

P = ParamSpec("P")
T = TypeVar("T")

LOOK = 0.05
"""Seconds from one look for a waiting signal to the next while another thread has the model."""


class _Signals:
    """Signals that Python handles, held back while a model is between two states.

    Their handlers are replaced, not masked: a mask holds for one thread only. Python runs handlers in the main thread
    alone, at some instructions; none of them lies between two assignments, which is what the code here rests on.
    """

    def __init__(self) -> None:
        self.usual: dict[int, Callable[[int, FrameType | None], Any]] = {}
        """The handlers that were there before."""
        self.open = 0
        """How many `with`s have asked for this and are not left yet."""
        self.busy = 0
        """How many of them are between two states."""
        self.waiting: list[int] = []
        self.leaving: CodeType | None = None
        """A function that a signal must not keep from beginning."""

    def come(self, number: int, frame: FrameType | None) -> None:
        """The handler: at once or, between two states, later."""
        if self.busy or (frame is not None and frame.f_code is self.leaving):
            self.waiting.append(number)
        else:
            self.usual[number](number, frame)

    def hold(self) -> None:
        """From here on signals wait."""
        for number in _NUMBERS:
            usual = signal.getsignal(number)
            if callable(usual) and usual != self.come:
                self.usual[number] = usual
                signal.signal(number, self.come)
        self.open += 1
        self.busy += 1

    def leave(self) -> None:
        """The end of a `with`: what waits is delivered, and the usual handlers are back after the last."""
        self.open -= 1
        self.busy -= 1
        if self.busy:
            return
        try:
            self.deliver()
        finally:
            if not self.open:
                for number, usual in self.usual.items():
                    if signal.getsignal(number) == self.come:
                        signal.signal(number, usual)
                self.usual.clear()

    def deliver(self) -> None:
        """Handle what waits, which may raise, where nothing is half done."""
        numbers, self.waiting = self.waiting, []
        for number in numbers:
            self.usual[number](number, None)


_NUMBERS = sorted(signal.valid_signals())
_SIGNALS = _Signals()


def _is_main() -> bool:
    """Whether this is the one thread that signals interrupt."""
    return threading.current_thread() is threading.main_thread()


class uninterrupted:  # noqa: N801 - read as a word: with uninterrupted():
    """Within it signals wait for the end of the `with`."""

    def __enter__(self) -> None:
        self._main = _is_main()
        if self._main:
            _SIGNALS.hold()

    def __exit__(self, *error: object) -> None:
        if self._main:
            _SIGNALS.leave()


class _Restored(AbstractContextManager[T]):
    """A context manager whose way in and way out are whole, whatever signal comes; inside, signals come at once."""

    def __init__(self, inner: AbstractContextManager[T]) -> None:
        self._inner = inner
        self._main = _is_main()

    def __enter__(self) -> T:
        if self._main:
            _SIGNALS.hold()
        try:
            value = self._inner.__enter__()
            try:
                while self._main and _SIGNALS.busy == 1 and _SIGNALS.waiting:
                    _SIGNALS.deliver()
            except BaseException as error:
                self._inner.__exit__(type(error), error, error.__traceback__)
                raise
        except BaseException:
            if self._main:
                _SIGNALS.leave()
            raise
        # No call from the last look at what waits to the return: a signal comes before the one or after the other.
        if self._main:
            _SIGNALS.busy -= 1
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._main:  # no call before this: see `_Signals.leaving`
            _SIGNALS.busy += 1
        try:
            return self._inner.__exit__(kind, error, trace)
        finally:
            if self._main:
                _SIGNALS.leave()


_SIGNALS.leaving = _Restored.__exit__.__code__


def restored(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """As `contextlib.contextmanager`, for a state that must be taken back whenever it was put on.

    With an ordinary one, a Ctrl-C between putting a state on and entering the `with` leaves it on.
    """
    managed = contextmanager(function)

    @wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Restored(managed(*args, **kwargs))

    return made


_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # pyright: ignore[reportGeneralTypeIssues]


@restored
def alone(owner: nn.Module) -> Iterator[None]:
    """Within it the model is this thread's; other threads wait for the end of the `with`. It may be nested.

    Args:
        owner: The model that holds language model and head, `Anatomy.owner`: the same for all who share a model.
    """
    lock = _LOCKS.setdefault(owner, threading.RLock())
    while not lock.acquire(timeout=LOOK):
        if _is_main():
            _SIGNALS.deliver()  # nothing is changed yet: Ctrl-C need not wait
    try:
        yield
    finally:
        lock.release()


class Lockable(Protocol):
    """A VLM."""

    def alone(self) -> AbstractContextManager[None]:
        """Within it the model is this thread's."""
        ...


V = TypeVar("V", bound=Lockable)


def by_one_thread(function: Callable[Concatenate[V, P], T]) -> Callable[Concatenate[V, P], T]:
    """Let a function have the model, its first argument, to itself from beginning to end."""

    @wraps(function)
    def made(vlm: V, *args: P.args, **kwargs: P.kwargs) -> T:
        with vlm.alone():
            return function(vlm, *args, **kwargs)

    return made
