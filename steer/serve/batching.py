"""The engine that writes many replies at once on one loaded model, each under its own sliders and sampler.

It implements `steer.serve.engine.Engine`. Every step is one forward pass over the packed tokens of all texts
(`steer.serve.packed`). The steering hooks look up for each token which text's sliders apply to it. Each text then draws
its next token from its own random stream. So a reply is the same as if it had been written alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steer.core.edit import Edit
from steer.errors import SteerError, UsageError
from steer.files import one_line
from steer.model.loading import release_threads
from steer.model.sampling import Draw, choose, logprobs, nothing_to_draw
from steer.model.steering.low_rank import ForwardContext
from steer.model.steering.receipts import Receipt, Tally
from steer.model.written import WrittenText
from steer.serve.engine import Busy, Event, Finished, Job, Token
from steer.serve.packed import Batcher, Part, check_blocks

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

_log = logging.getLogger(__name__)
_CLOSED = "the engine is closed; start another"


@dataclass(eq=False)
class _Text:
    """A job that the engine has accepted, waiting or running."""

    number: int
    job: Job
    on_event: Callable[[Event], None]
    draw: Draw
    tokens: WrittenText
    pages: int
    """Pages of the KV cache that the job takes at most."""
    edit: Edit | None = None
    """The edit applied in the current step."""
    written: int = 0
    """Tokens written so far."""
    begun: float = 0.0
    """When the job left the queue, in seconds of the monotonic clock."""
    cancelled: bool = False
    """The job ends before the next step."""
    over: bool = False
    """Whether the last event is sent, or is being sent."""

    @property
    def id(self) -> str:
        """The batcher's id of this text: its request's identity, and its number among all texts."""
        return f"{id(self.job.request)} {self.number}"


class BatchingEngine:
    """An `Engine` that uses transformers' continuous batching.

    A text begins only when the pages for its whole length are free, so a text that has begun is never interrupted. A
    request with several texts takes no more places and pages than it leaves free, so that another request finds room
    at once. Other code may use the model meanwhile, in turns of one token. `close` restores the model's own attention.
    """

    def __init__(
        self, model: SteeredModel, max_running: int = 16, max_waiting: int = 64, context: int | None = None
    ) -> None:
        """Allocate the KV cache, check packed logits against plain ones, and start the engine's thread.

        `max_running`: texts that are written at the same time. `max_waiting`: texts that may queue behind them.
        `context`: most tokens of a prompt and its reply together, by default the model's; less if a quarter of the free
        memory cannot hold that many. Errors: SteerError without memory, UnsupportedError for another transformers
        and for blocks whose state cannot be paged.
        """
        for name, value, least in (
            ("max_running", max_running, 1),
            ("max_waiting", max_waiting, 0),
            ("context", context, 1),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name}: expected a whole number of at least {least}, found {value}")
        self.model, self.max_running, self.max_waiting = model, max_running, max_waiting
        # A text beyond the rotary limit would change the rotary embedding of the whole step.
        longest = min(n for n in (context, model.context, model.anatomy.rotary_limit) if n is not None)
        self._new_batcher = self._batcher_maker(max_running, longest)
        self._wake = threading.Event()
        """Set when there may be something to do; the engine's thread waits for it."""
        self._lock = threading.RLock()
        """Guards `_running` and `_waiting`, and adding texts to `_batcher`."""
        self._running: dict[str, _Text] = {}
        self._waiting: list[_Text] = []
        self._numbers = count()
        self.problem: str | None = None
        """Why the engine accepts no more jobs; None while it accepts them."""
        self._seconds = 1.0
        """Seconds that a text takes from its first step to its end, a running mean."""
        self._tally = _Receipts()
        self._routing: tuple[object, Tensor, Tensor] = (None, torch.empty(0), torch.empty(0))
        """The texts and edits of the last step; for each packed token the index of its edit, and the position in its
        text that writes the first token of the reply. Reused while the former stay the same."""
        self._batcher = self._new_batcher()
        self.context = self._batcher.context
        """Most tokens of a prompt and its reply together."""
        try:
            with model.untouched():
                self._batcher.check()
        except BaseException:
            self._batcher.close()
            raise
        release_threads()  # those that loaded and checked the model; the engine's thread has others
        self._thread = threading.Thread(target=self._run, name="steer-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """See `Engine`, as for the other public methods."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job, on_event: Callable[[Event], None]) -> Callable[[], None]:
        self._check(job)
        draw = Draw(job.sampler, job.prompt, job.key, self.model.tokenizer, job.begun)
        tokens = WrittenText(self.model.tokenizer, job.prompt, len(job.prompt) - job.begun)
        pages = self._batcher.pages(len(job.prompt) + job.sampler.max_new_tokens)
        text = _Text(next(self._numbers), job, on_event, draw, tokens, pages)

        def cancel() -> None:
            text.cancelled = True
            self._wake.set()

        with self._lock:
            if self.problem is not None:
                raise SteerError(self.problem)
            self._waiting.append(text)
            self._begin()
            # Free places count as room in the queue: a text may wait beside them because its request has its share.
            if self.running + self.waiting > self.max_running + self.max_waiting:
                self._waiting.pop()
                raise Busy(
                    f"queue full: {self.running} replies are being written and {self.waiting} wait; ask again later",
                    min(max(self._seconds / self.max_running, 1.0), 60.0),
                )
        self._wake.set()
        return cancel

    def close(self) -> None:
        with self._lock:
            self.problem = self.problem or _CLOSED
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _batcher_maker(self, places: int, context: int) -> Callable[[], Any]:
        """Return the function that makes a batcher, also after an error in its bookkeeping. Errors: as `__init__`."""
        with self.model.untouched():
            check_blocks(self.model.hf, self.model.anatomy)
        return partial(Batcher, self.model.hf, self.model.anatomy, places, context)

    def _edit_of(self, text: _Text) -> Edit | None:
        """The edit that a text is under in the step that was prepared."""
        edit = text.job.edit()
        if edit is not None and edit is not text.edit:
            # Prepared here, so that an error in this edit fails this text alone.
            self.model.steering.work_out(edit)
        return edit

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

    # The methods below are called in the engine's thread; `_begin` is called in any thread.

    def _run(self) -> None:
        try:
            while self.problem is None:
                self._wake.clear()
                with self._lock:
                    cancelled = [t for t in (*self._running.values(), *self._waiting) if t.cancelled]
                try:
                    for text in cancelled:
                        self._end(text, "cancelled")
                    worked = self._step()
                except Exception as e:
                    self._recover(e)
                    worked = True
                if not worked and self.problem is None:
                    self._wake.wait()
        except BaseException as e:
            self.problem = f"the engine has stopped: {type(e).__name__}"
            raise
        finally:
            # Every open job gets its last event, so that no client waits for a reply that will not come.
            with self._lock:  # waits for a job that is just being accepted
                texts = [*self._running.values(), *self._waiting]
            for text in texts:
                self._end(text, "cancelled" if self.problem == _CLOSED else SteerError(self.problem))
            with self.model.steering.lock:
                self._batcher.close()

    def _step(self) -> bool:
        """Write one token of every running text. Return False if there was nothing to do."""
        parts = self._batcher.next()
        if not parts:
            return False
        texts = [self._running[p.id] for p in parts]
        for text in texts:
            try:
                text.edit = self._edit_of(text)
            except Exception as e:
                self._fail(text, e)
        writing = [text for text, part in zip(texts, parts, strict=True) if part.writes]
        try:
            logits = self._forward(parts, texts)
            tokens = choose(logits, [text.draw for text in writing])
        except Exception as e:
            # The KV cache of these texts may be incomplete, so they all fail. Other texts were not touched.
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
                self._send_token(text, token, row)
        return True

    def _forward(self, parts: list[Part], texts: Sequence[_Text]) -> Float[Tensor, "writing vocab"]:
        steering, batcher = self.model.steering, self._batcher
        # Texts with the same edit share a row, so that nothing is prepared again when one of them comes or goes.
        rows = list(dict.fromkeys(text.edit for text in texts))
        row_of_text = [rows.index(text.edit) for text in texts]

        def of_tokens(numbers: list[int]) -> Tensor:
            """Return a number per text as one per packed token."""
            counts = torch.tensor([p.tokens.stop - p.tokens.start for p in parts])
            return torch.tensor(numbers).repeat_interleave(counts).to(batcher.positions.device)

        if self._routing[0] != (parts, row_of_text):
            row = of_tokens(row_of_text)
            self._routing = (parts, row_of_text), row, of_tokens([t.tokens.start - 1 for t in texts])
        _, row, first = self._routing
        with steering.alone(rows), torch.inference_mode():
            context = ForwardContext(row=row if len(rows) > 1 else None, packed=True, tally=self._tally)
            if steering.timed:
                context.index = batcher.positions - first
            if steering.splits_reply:
                context.answer = of_tokens([text.tokens.answer for text in texts])[None]
            reads = [(text.number, row, p.tokens) for text, row, p in zip(texts, row_of_text, parts, strict=True)]
            self._tally.begin(reads, rows)
            with steering.passing(context):
                return batcher.forward()

    def _send_token(self, text: _Text, token: int, logits: Float[Tensor, " vocab"]) -> None:
        job, end = text.job, token in self.model.end_token_ids
        logprob, top = (None, []) if job.top_logprobs is None else logprobs(logits, token, job.top_logprobs)
        if not text.cancelled:
            self._send_event(text, Token(token, logprob, tuple(top), end))
        text.tokens.append(token)
        text.written += 1
        if not text.cancelled and (end or text.written >= job.sampler.max_new_tokens):
            self._end(text, "stop" if end else "length")

    def _fail(self, text: _Text, error: Exception) -> None:
        if not isinstance(error, SteerError):
            _log.error("a reply could not be written", exc_info=error)
            error = SteerError(f"the reply could not be written: {type(error).__name__}: {one_line(error)}")
        self._end(text, error)

    def _end(self, text: _Text, how: Literal["stop", "length", "cancelled"] | SteerError) -> None:
        """End a text: free its pages, begin the texts that waited, and send the job its last event."""
        if text.over:
            return
        text.over = True
        try:
            receipt = self._tally.ended(text.number)
        except Exception as e:
            _log.error("no receipts for the replies being written", exc_info=e)
            self._tally, receipt = _Receipts(), Receipt(0)
        with self._lock:
            if self._running.pop(text.id, None) is not None:
                self._seconds += 0.2 * (time.monotonic() - text.begun - self._seconds)
                if how not in ("stop", "length"):  # in those two cases transformers has dropped the text itself
                    self._batcher.drop(text.id)
            elif text in self._waiting:
                self._waiting.remove(text)
            self._begin()
        self._send_event(
            text, how if isinstance(how, SteerError) else Finished(how, receipt if receipt.sliders else None)
        )

    def _send_event(self, text: _Text, event: Event) -> None:
        try:
            text.on_event(event)
        except Exception as e:
            _log.error("a reply has lost its listener", exc_info=e)
            text.cancelled = True

    def _begin(self) -> None:
        """Give waiting texts to the batcher while there is a place, and free pages for the whole length of each."""
        with self._lock:
            for text in list(self._waiting):
                if len(self._running) >= self.max_running or self.problem is not None:
                    return
                places = self.max_running - len(self._running) - 1
                pages = self._batcher.capacity - sum(t.pages for t in self._running.values()) - text.pages
                same_request = [text, *(t for t in self._running.values() if t.job.request is text.job.request)]
                if len(same_request) > 1 and (len(same_request) > places or sum(t.pages for t in same_request) > pages):
                    continue
                if pages < 0:
                    return  # texts further back in the queue would take the pages that this one waits for
                self._waiting.remove(text)
                self._running[text.id] = text
                text.begun = time.monotonic()
                self._batcher.add(
                    text.id, text.job.prompt, text.job.sampler.max_new_tokens, sorted(self.model.end_token_ids)
                )

    def _recover(self, error: Exception) -> None:
        """After an error in transformers' own bookkeeping: fail the running texts and go on with a new batcher.

        If no text was running, the error would come again at every step, so the engine stops.
        """
        with self.model.steering.lock, self._lock:
            interrupted = list(self._running.values())
            self._running.clear()
            try:
                if not interrupted:
                    raise error
                self._batcher.close()
                self._batcher = self._new_batcher()
            except Exception as e:
                _log.error("the engine has stopped", exc_info=e)
                self.problem = f"the engine has stopped: {type(e).__name__}: {one_line(e)}"
        for text in interrupted:
            self._fail(text, error)


class _Receipts(Tally):
    """The receipts of all texts that are being written, by the text's number."""

    def ended(self, text: int) -> Receipt:
        """Return a text's receipt and forget the text."""
        receipt = self.receipt(text)
        self._texts.pop(text, None)
        return receipt
