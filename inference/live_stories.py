"""Stories that many clients read as they are generated: threads run engines, asyncio queues carry the tokens."""

import asyncio
import contextlib
import json
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

from config.schema import SamplingConfig
from data.tokenizer import END_OF_STORY, token_bytes
from inference.engine import Continuation, Engine
from inference.growing_text import GrowingText
from model import Transformer

ROWS = 64  # stories generated at once, by all engines
WAITING = 64  # stories that wait for a row; further ones are refused
ALTERNATIVES = 5  # of each token, how many of the likeliest are sent
STEPS, PACE = 16, 0.2  # tokens, and seconds, after which the new tokens are sent at the latest
encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps() would make an encoder each time
Event = dict[str, Any]  # of a token, or of the story's end: this one has a "reason"


class LiveStory:
    """A story on its way to a client: its continuation, its text so far, and the queue of its events.

    open: the stories of its engine that have not ended; it leaves them when nobody reads it any more.
    """

    def __init__(self, row: Continuation, text: GrowingText, open: set["LiveStory"]) -> None:
        self.row, self.text, self.open = row, text, open
        open.add(self)
        self.events: asyncio.Queue[list[Event]] = asyncio.Queue()  # at most max_new_tokens + 1 of them
        self.sent, self.cancelled = 0, False  # sent: how many of the row's tokens have had their event

    async def read(self) -> AsyncIterator[list[Event]]:
        """The story's events as they come, in groups. A reader that stops early frees its row."""
        try:
            while True:
                events = await self.events.get()
                yield events
                if "reason" in events[-1]:
                    return
        finally:
            self.cancelled = True
            self.open.discard(self)


class LiveStories(threading.Thread):
    """A thread that runs an engine. add() and open belong to the event loop; all else to the thread.

    threads: that compute. rows: stories at once; waiting: that wait for a row. A failure of the engine ends all its
    stories with the reason "error", and the thread.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, threads: int, rows: int, waiting: int) -> None:
        super().__init__(name="engine", daemon=True)
        self.threads = threads
        self.end, self.pieces = tokenizer.token_to_id(END_OF_STORY), token_bytes(tokenizer)
        self.engine = Engine(model, self.end, len(self.pieces), rows, check_every=STEPS, alternatives=ALTERNATIVES)
        self.limit = self.engine.max_rows + waiting
        self.open: set[LiveStory] = set()  # those that were added and have not ended, as the event loop knows
        self.inbox: queue.SimpleQueue[LiveStory | None] = queue.SimpleQueue()  # None wakes the thread
        self.loop: asyncio.AbstractEventLoop | None = None
        self.closing = False

    def add(self, prompt: Sequence[int], sampling: SamplingConfig, stops: Sequence[str] = ()) -> LiveStory | None:
        """Begin a story as soon as there is a row for it; None if too many wait already.

        prompt: token ids, the first of them END_OF_STORY.
        """
        if len(self.open) >= self.limit or self.closing or not self.is_alive():
            return None
        self.loop = asyncio.get_running_loop()
        row = Continuation(0, prompt, sampling.seed, sampling)
        story = LiveStory(row, GrowingText(self.pieces, stops, prompt), self.open)
        self.inbox.put(story)
        return story

    def close(self) -> None:
        """End all stories with the reason "shutdown", and the thread. May be called by a signal handler."""
        self.closing = True
        self.inbox.put(None)

    def run(self) -> None:
        torch.set_num_threads(self.threads)  # of this thread
        stories: list[LiveStory] = []
        reason = "error"
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    while story := self.inbox.get(block=not stories and not self.closing):
                        stories.append(story)
                        self.engine.add(story.row)
                if self.closing:
                    reason = "shutdown"
                    return
                for story in stories:
                    story.row.done = story.row.done or story.cancelled
                stories = self._advance([story for story in stories if not story.cancelled])
        finally:
            self.closing = True
            self._deliver(lambda: [(story, [{"reason": reason, "text": ""}]) for story in self.open])

    def _advance(self, stories: list[LiveStory]) -> list[LiveStory]:
        """Generate the next tokens and send them. Returns the stories that have not ended."""
        start = time.perf_counter()
        self.engine.advance()
        seconds = (time.perf_counter() - start) / self.engine.check_every
        self.engine.check_every = max(1, min(STEPS, math.floor(PACE / max(seconds, 1e-6))))
        news = [(story, events) for story in stories if (events := self._news(story))]
        self._deliver(lambda: news)
        return [story for story in stories if not story.row.done]

    def _news(self, story: LiveStory) -> list[Event]:
        """The events of a story's new tokens; of its end, too. A stop text ends the story."""
        row, text, events = story.row, story.text, []
        while story.sent < len(row.new) and not text.stopped:
            token, number = row.new[story.sent], story.sent
            likeliest = [{"text": text.peek(other), "id": other, "probability": round(math.exp(log), 6)}
                         for other, log in row.alternatives[number]]
            events.append({"text": text.add([token]), "id": token, "likeliest": likeliest,
                           "log_probability": round(row.log_probabilities[number], 6)})
            story.sent += 1
        row.done = row.done or text.stopped
        if row.done:
            reason = "stop" if text.stopped else "end" if row.new[-1] == self.end else "max_new_tokens"
            events.append({"reason": reason, "text": text.add([], last=True), "tokens": story.sent,
                           "log_probability": round(sum(row.log_probabilities[:story.sent]), 6)})
        return events

    def _deliver(self, make_news: Callable[[], list[tuple[LiveStory, list[Event]]]]) -> None:
        """Put events into the stories' queues, in the event loop, which wakes their readers."""
        def deliver() -> None:
            for story, events in make_news():
                story.events.put_nowait(events)
                if "reason" in events[-1]:
                    self.open.discard(story)

        if self.loop:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody reads any more
                self.loop.call_soon_threadsafe(deliver)


def server_sent(data: Any, event: str = "") -> str:
    """An event for a client, in the form of text/event-stream."""
    return (f"event: {event}\n" if event else "") + f"data: {encode(data)}\n\n"
