"""The engine that writes many replies at once on one loaded model, each under sliders and a sampler of its own.

Every step is one forward pass over the packed tokens of all texts, whose hooks look up by token whose sliders to go
by; every text then draws its next token from a random stream of its own. So a reply is what it would have been alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import SteerError, UsageError
from steer.live.frame import TextPass
from steer.live.receipts import Receipt
from steer.live.sampling import Draw, choose, logprobs, nothing_to_draw
from steer.live.serve.engine import Busy, Event, Finished, Job, Token
from steer.live.serve.packed import Batcher, Part
from steer.live.serve.taken import Accounts, Places, Taken

if TYPE_CHECKING:
    from steer.live.model import SteeredModel

_log = logging.getLogger(__name__)


class BatchingEngine:
    """An `Engine` by transformers' continuous batching.

    A text that was begun is never put off: it is begun once the pages for all of it are free. So that another request
    finds room at once, one that has several texts takes no more places and pages than it leaves free. The model may be
    used beside it, a token at a time; its own attention is back after `close`.
    """

    def __init__(
        self, model: SteeredModel, max_running: int = 16, max_waiting: int = 64, context: int | None = None
    ) -> None:
        """`context`: tokens of a prompt and its reply together; the model's own by default, less where a quarter of
        the free memory does not hold that many.

        Errors: SteerError without memory, UnsupportedError for a transformers whose continuous batching is another.
        """
        for name, value, least in (
            ("max_running", max_running, 1),
            ("max_waiting", max_waiting, 0),
            ("context", context, 1),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name}: expected a whole number of at least {least}, found {value}")
        self.model, self.max_running, self.max_waiting = model, max_running, max_waiting
        most = model.context
        if model.anatomy.rotary_limit is not None:  # a longer text would change what the others of a step are read as
            most = min(most, model.anatomy.rotary_limit)
        self._wanted = most if context is None else min(context, most)
        self._wake = threading.Event()
        """Set when there may be something to do."""
        self._lock = threading.RLock()
        """Of the two collections, and of `_batcher` as a place to add to."""
        self._running: dict[str, Taken] = {}
        self._waiting: deque[Taken] = deque()
        self._numbers = count()
        self._closing = False
        self._broken: str | None = None
        """Why nothing can be taken any more."""
        self._seconds = 1.0
        """What a text takes, a running mean."""
        self._tally = Accounts()
        self._places: Places | None = None
        self._batcher = self._new_batcher()
        self.context = self._batcher.context
        """Tokens of a prompt and its reply together, at most."""
        try:
            with model.untouched():
                self._batcher.check()
        except BaseException:
            self._batcher.close()
            raise
        self._thread = threading.Thread(target=self._run, name="steer-engine", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """Why no job can be taken any more; None while they can."""
        return (self._broken or "the engine is closed; start another") if self._closing else None

    @property
    def running(self) -> int:
        """Jobs being written."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs that were taken and are not begun."""
        return len(self._waiting)

    def submit(self, job: Job, on_event: Callable[[Event], None]) -> Taken:
        """Take a job; see `Engine.submit`.

        Errors: Busy when the queue is full, UsageError for a job that can never fit, SteerError after `close`.
        """
        self._check(job)
        draw = Draw(job.sampler, job.prompt, job.key, self.model.tokenizer, job.begun)
        needs = self._batcher.need(len(job.prompt) + job.sampler.max_new_tokens)
        text = Taken(next(self._numbers), job, on_event, draw, self.model.end_token_ids, needs, self._wake)
        with self._lock:
            if self._closing:
                raise SteerError(self.problem or "")
            self._waiting.append(text)
            self._begin()
            # Texts that wait though places are free, as their request has its share, do not count as waiting.
            if self.running + self.waiting > self.max_running + self.max_waiting:
                self._waiting.pop()
                raise Busy(
                    f"queue full: {self.running} replies are being written and {self.waiting} wait; ask again later",
                    min(max(self._seconds / self.max_running, 1.0), 60.0),
                )
        self._wake.set()
        return text

    def close(self) -> None:
        """End what is running and the engine's thread. Jobs hear `Finished("cancelled")`."""
        with self._lock:
            self._closing = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check(self, job: Job) -> None:
        """Raise UsageError for a job that can never be written."""
        length, vocab = len(job.prompt) + job.sampler.max_new_tokens, self.model.hf.config.get_text_config().vocab_size
        if length > self.context:
            raise UsageError(
                f"expected at most {self.context} tokens of prompt and reply together, found {len(job.prompt)} of the "
                f"prompt and max_new_tokens {job.sampler.max_new_tokens}; shorten the one or the other"
            )
        for token in (*job.prompt, *(token for token, _ in job.sampler.logit_bias)):
            if not 0 <= token < vocab:
                raise UsageError(f"expected token ids from 0 to {vocab - 1}, the model's vocabulary, found {token}")

    # What follows is called in the engine's thread, `_begin` in any.

    def _run(self) -> None:
        try:
            while not self._closing:
                self._wake.clear()
                try:
                    self._end_cancelled()
                    worked = self._step()
                except Exception as e:
                    self._recover(e)
                    worked = True
                if not worked and not self._closing:
                    self._wake.wait()
        except BaseException as e:
            self._broken = f"the engine has stopped: {type(e).__name__}"
            raise
        finally:
            # Whatever happened, nobody waits for a reply that does not come.
            with self._lock:
                self._closing = True
            for text in [*self._running.values(), *self._waiting]:
                self._end(text, SteerError(self._broken) if self._broken else "cancelled")
            with self.model.steering.lock:
                self._batcher.close()

    def _step(self) -> bool:
        """A token for every text that is being written. False when there is none."""
        parts = self._batcher.next()
        if not parts:
            return False
        texts = [self._running[p.id] for p in parts]
        for text in texts:
            self._ask_edit(text)
        writing = [text for text, part in zip(texts, parts, strict=True) if part.writes]
        try:
            logits = self._forward(parts, texts)
            tokens = choose(logits, [text.draw for text in writing])
        except Exception as e:
            # What was cached of these texts may be half of it; nothing was touched of others.
            for text in texts:
                self._fail(text, e)
            return True
        self._batcher.take([0 if token is None else token for token in tokens])
        finite = logits.amax(-1).isfinite().tolist()
        for text, token, row, fine in zip(writing, tokens, logits, finite, strict=True):
            if not fine:
                self._fail(text, self.model.overflow(text.edit is not None))
            elif token is None:
                self._fail(text, nothing_to_draw())
            elif not text.over:
                self._tell_token(text, token, row)
        return True

    def _ask_edit(self, text: Taken) -> None:
        try:
            edit = text.job.edit()
            if edit is not None and edit is not text.edit:
                # What is wrong with it is wrong for this text alone.
                self.model.steering.work_out(edit)
            text.edit = edit
        except Exception as e:
            self._fail(text, e)

    def _forward(self, parts: list[Part], texts: Sequence[Taken]) -> Float[Tensor, "writing vocab"]:
        steering, batcher = self.model.steering, self._batcher
        # Texts under one edit share a row: nothing need be worked out anew as they come and go.
        rows = list(dict.fromkeys(text.edit for text in texts))
        mine = [rows.index(text.edit) for text in texts]
        if self._places is None or self._places.key != (parts, mine):
            self._places = Places.of(parts, mine, texts, batcher.positions.device)
        with steering.alone(rows), torch.inference_mode():
            told = TextPass(row=self._places.row if len(rows) > 1 else None, packed=True, tally=self._tally)
            if steering.timed:
                told.index = batcher.positions - self._places.first
            brings = [(text.number, row, p.tokens) for text, row, p in zip(texts, mine, parts, strict=True)]
            self._tally.begin(brings, rows)
            with steering.passing(told):
                return batcher.forward()

    def _tell_token(self, text: Taken, token: int, logits: Float[Tensor, " vocab"]) -> None:
        job, end = text.job, token in text.ends
        logprob, top = (None, []) if job.top_logprobs is None else logprobs(logits, token, job.top_logprobs)
        if not text.cancelled:
            self._tell(text, Token(token, logprob, tuple(top), end))
        text.made += 1
        if not text.cancelled and (end or text.made >= job.sampler.max_new_tokens):
            self._end(text, "stop" if end else "length")

    def _fail(self, text: Taken, error: Exception) -> None:
        if not isinstance(error, SteerError):
            _log.error("a reply could not be written", exc_info=error)
            found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            error = SteerError(f"the reply could not be written: {found}")
        self._end(text, error)

    def _end(self, text: Taken, how: Literal["stop", "length", "cancelled"] | SteerError) -> None:
        """The last that a job hears."""
        if text.over:
            return
        text.over = True
        receipt = self._receipt(text)
        with self._lock:
            if self._running.pop(text.id, None) is not None:
                self._seconds += 0.2 * (time.monotonic() - text.begun - self._seconds)
                if how not in ("stop", "length"):  # else transformers has seen to it itself
                    self._batcher.drop(text.id)
            elif text in self._waiting:
                self._waiting.remove(text)
            self._begin()
        self._tell(text, how if isinstance(how, SteerError) else Finished(how, receipt))

    def _receipt(self, text: Taken) -> Receipt | None:
        try:
            receipt = self._tally.ended(text.number)
        except Exception as e:
            _log.error("no receipts for the replies being written", exc_info=e)
            self._tally = Accounts()
            return None
        return receipt if receipt.sliders else None

    def _tell(self, text: Taken, event: Event) -> None:
        try:
            text.on_event(event)
        except Exception as e:
            _log.error("a reply has lost its listener", exc_info=e)
            text.cancelled = True

    def _end_cancelled(self) -> None:
        with self._lock:
            cancelled = [t for t in (*self._running.values(), *self._waiting) if t.cancelled]
        for text in cancelled:
            self._end(text, "cancelled")

    def _begin(self) -> None:
        """Hand over the texts that come next, as far as there is a place and pages for the whole of each."""
        with self._lock:
            for text in list(self._waiting):
                if len(self._running) >= self.max_running or self._closing:
                    return
                places = self.max_running - len(self._running) - 1
                pages = self._batcher.capacity - sum(t.needs for t in self._running.values()) - text.needs
                own = [text, *(t for t in self._running.values() if t.job.request is text.job.request)]
                if len(own) > 1 and (len(own) > places or sum(t.needs for t in own) > pages):
                    continue
                if pages < 0:
                    return  # those behind it would take the pages that it waits for
                self._waiting.remove(text)
                self._running[text.id] = text
                text.begun = time.monotonic()
                self._batcher.add(text.id, text.job.prompt, text.job.sampler.max_new_tokens, sorted(text.ends))

    def _recover(self, error: Exception) -> None:
        """After an error of transformers' own bookkeeping: what is being written is lost, the rest goes on anew."""
        with self.model.steering.lock, self._lock:
            hit = list(self._running.values())
            self._running.clear()
            try:
                if not hit:  # it would come again and again
                    raise error
                self._batcher.close()
                self._batcher = self._new_batcher()
            except Exception as e:
                _log.error("the engine has stopped", exc_info=e)
                self._broken = f"the engine has stopped: {' '.join(f'{type(e).__name__}: {e}'.split())[:300]}"
                self._closing = True
        for text in hit:
            self._fail(text, error)

    def _new_batcher(self) -> Batcher:
        return Batcher(self.model.hf, self.model.anatomy, self.max_running, self._wanted)
