"""Let one thread at a time have a model, and put the states of a model back whatever happens.

    with vlm.alone(): ...

A model's weights, hooks and settings are shared by all that hold it, so that a thread that runs or changes the model
holds its lock, from before the change until it is taken back. A state that a model is put into for a while is a
generator under `restored`: a signal (Ctrl-C) that comes while the state is put on or taken off waits for that.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import CodeType, FrameType, TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, no_type_check, runtime_checkable
from weakref import WeakKeyDictionary

from torch import nn

P = ParamSpec("P")
T = TypeVar("T")

LOOK = 0.05
"""Seconds between two looks for a waiting signal while another thread has the model."""


@no_type_check
class _Signals:
    """A holder of the signals that Python handles, which wait while a model is between two states.

    Their handlers are replaced, not masked: a mask holds for one thread only. Python runs handlers in the main thread
    alone, at some instructions; none of them lies between two assignments, which is what the code here rests on. So
    these classes ask not to be wrapped by what checks types at run time: a wrapper is more instructions.
    """

    def __init__(self) -> None:
        self.usual: dict[int, Callable[[int, FrameType | None], Any]] = {}
        """Handlers that were there before, by the number of the signal."""
        self.open = 0
        """Number of `with`s that have asked for this and are not left yet."""
        self.busy = 0
        """Number of them that are between two states."""
        self.waiting: list[int] = []
        """Signals that came meanwhile, in order."""
        self.leaving: CodeType | None = None
        """Code of a function that a signal must not keep from beginning."""

    def come(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal at once or, between two states, note it for later."""
        # A signal can come after `_Restored.__exit__` was called and before its first line has made this busy: the
        # frame that was interrupted tells.
        if self.busy or (frame is not None and frame.f_code is self.leaving):
            self.waiting.append(number)
        else:
            self.usual[number](number, frame)

    def hold(self) -> None:
        """Let signals wait from here on; one that comes before its handler is replaced raises, and nothing is held."""
        self.open += 1
        self.busy += 1
        try:
            for number in _NUMBERS:
                usual = signal.getsignal(number)
                # Looked up each time: the user can have set another handler since. One that is not callable (ignored,
                # default, set outside Python) does not run Python code and needs no holding back.
                if callable(usual) and usual != self.come:
                    self.usual[number] = usual
                    signal.signal(number, self.come)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Leave a `with`: put the usual handlers back after the last one, and deliver the signals that wait."""
        try:
            self.open -= 1
            if not self.open:
                self.put_back()
        finally:
            self.busy -= 1
            if not self.busy:
                self.deliver()

    def put_back(self) -> None:
        """Put the usual handlers back where this one still is the handler: one that was set in the meantime stays."""
        try:
            for number, usual in list(self.usual.items()):
                if signal.getsignal(number) == self.come:
                    signal.signal(number, usual)
        except BaseException:  # the handler of a signal that is back already; the others are not yet
            self.put_back()
            raise

    def deliver(self) -> None:
        """Handle the signals that wait, which may raise, at a point where nothing is half done."""
        numbers, self.waiting = self.waiting, []
        for number in numbers:
            self.usual[number](number, None)


_NUMBERS = sorted(signal.valid_signals())
_SIGNALS = _Signals()


def _is_main() -> bool:
    """Whether this is the main thread, the only one that signals interrupt."""
    return threading.current_thread() is threading.main_thread()


@no_type_check
class uninterrupted:  # noqa: N801 - read as a word: with uninterrupted():
    """Let signals wait for the end of the `with`."""

    def __enter__(self) -> None:
        self._main = _is_main()
        if self._main:
            _SIGNALS.hold()

    def __exit__(self, *error: object) -> None:
        if self._main:
            _SIGNALS.leave()


@no_type_check
class _Restored(AbstractContextManager[T]):
    """A context manager that no signal can leave half entered or half left; inside it signals come at once."""

    def __init__(self, inner: AbstractContextManager[T]) -> None:
        self._inner = inner
        self._main = _is_main()

    def __enter__(self) -> T:
        if self._main:
            _SIGNALS.hold()
        try:
            value = self._inner.__enter__()
            # What came on the way in is handled now, inside: if the handler raises, the state is taken off again. (In a
            # nested one, busy is larger than 1 where an outer way in or out is not done yet: signals wait for that.)
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
        # There is no call between the last look at what waits and the return: a signal comes before the look, or inside
        # the `with`.
        if self._main:
            _SIGNALS.busy -= 1
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._main:  # there must be no call before this line: see `_Signals.come`
            _SIGNALS.busy += 1
        try:
            return self._inner.__exit__(kind, error, trace)
        finally:
            if self._main:
                _SIGNALS.leave()


_SIGNALS.leaving = _Restored.__exit__.__code__


def restored(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """Make a context manager of a generator, as `contextlib.contextmanager` does, safe against signals.

    It is for a state that must be taken back whenever it was put on. With an ordinary one, a Ctrl-C between putting the
    state on and entering the `with` would leave it on.
    """
    managed = contextmanager(function)

    @wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Restored(managed(*args, **kwargs))

    return made


_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # pyright: ignore[reportGeneralTypeIssues]


@restored
def alone(owner: nn.Module) -> Iterator[None]:
    """Give this thread the model to itself inside the `with`; other threads wait for its end. It may be nested.

    Args:
        owner: The model that holds language model and head, `Anatomy.owner`: the same for all who share a model.
    """
    # One lock for each model, not for each VLM: two VLMs can hold the same model.
    lock = _LOCKS.setdefault(owner, threading.RLock())
    # On the way into a `with` under `restored`, signals are only noted: the wait is cut into pieces, to handle them.
    while not lock.acquire(timeout=LOOK):
        if _is_main():
            _SIGNALS.deliver()  # nothing is changed yet: Ctrl-C need not wait
    try:
        yield
    finally:
        lock.release()


@runtime_checkable
class Lockable(Protocol):
    """Anything that one thread at a time can have, such as a VLM."""

    def alone(self) -> AbstractContextManager[None]:
        """Give this thread the object to itself inside the `with`."""
        ...


V = TypeVar("V", bound=Lockable)


def by_one_thread(function: Callable[Concatenate[V, P], T]) -> Callable[Concatenate[V, P], T]:
    """Decorate a function so that its thread has the model, its first argument, to itself from beginning to end."""

    @wraps(function)
    def made(vlm: V, *args: P.args, **kwargs: P.kwargs) -> T:
        with vlm.alone():
            return function(vlm, *args, **kwargs)

    return made
