"""`ModelRunner.forward(slices) -> logits`: the only caller of the model."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from longstride.engine.attention import IMPLEMENTATION, Slice
from longstride.engine.cache import CacheLayout, KVCache, LayerShape
from longstride.engine.costs import StepCosts
from longstride.engine.fuse import Adapted, fuse, rows_at_once
from longstride.engine.native import Span
from longstride.errors import ModelError

CALIBRATION_ROWS = 1024


class ModelRunner:
    """Runs slices of any number of caches through one Hugging Face causal LM.

    Raises `ModelError` when the model's layers do not all go through the attention interface (recurrent layers) or
    use a sliding window: such a cache cannot be truncated.
    """

    def __init__(self, model: Any) -> None:
        self._lock = threading.Lock()
        self.model = model.eval()
        refuse_untruncatable(model.config)
        try:
            self.model.set_attn_implementation(IMPLEMENTATION)
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(
                f"{model.config.model_type} models do not use transformers' attention interface: {error}"
            ) from error
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.vocab_size: int = model.config.vocab_size
        self.max_positions: int = model.config.max_position_embeddings
        self.adapted = Adapted()
        self.layout = self._probe()
        self.products = fuse(model, self.adapted)
        self.costs = StepCosts(rows_at_once(model))
        self.forwards = 0
        self.tokens = 0

    def _probe(self) -> CacheLayout:
        """One forward of two tokens: learns each layer's KV shape, and that every layer is attention."""
        shapes: dict[int, LayerShape] = {}
        self._call([0, 0], [0, 1], torch.tensor([1]), shapes=shapes)
        expected = self.model.config.num_hidden_layers
        missing = sorted(set(range(expected)) - set(shapes))
        if missing:
            raise ModelError(
                f"layers {missing} of this {self.model.config.model_type} model keep no key-value cache that can be "
                "truncated; use a model with full attention in every layer"
            )
        return CacheLayout(tuple(shapes[i] for i in range(expected)), self.dtype, self.device)

    @torch.inference_mode()
    def _call(self, ids: Sequence[int], positions: Sequence[int], keep: torch.Tensor, **extra: object) -> torch.Tensor:
        """Logits [rows kept, vocabulary] of one row of tokens."""
        tokens = torch.tensor([ids], device=self.device)
        out = self.model(
            **self._embedded(ids, tokens),
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=False,
            logits_to_keep=keep.to(self.device),
            **extra,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _embedded(self, ids: Sequence[int], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's input: token ids, or their embeddings where an adapter has some of its own."""
        spans = [span for span in self.adapted.spans if span[2].tokens]
        if not spans:
            return {"input_ids": tokens}
        embeddings = self.model.get_input_embeddings()(tokens)
        for start, stop, adapter in spans:
            adapter.embed(ids[start:stop], embeddings[0, start:stop])
        return {"inputs_embeds": embeddings}

    def calibrate(self) -> None:
        """Run a few forwards, so that what a step costs here is known before the first draft: one row, two, those that
        share a pass over the weights, one more and two passes, over nothing and over `CALIBRATION_ROWS` keys."""
        most = 2 * self.costs.free
        cache = KVCache(self.layout, CALIBRATION_ROWS + most, initial=CALIBRATION_ROWS + most)
        for buffer in (*cache.keys, *cache.values):
            buffer.zero_()
        taken: dict[tuple[int, int], list[float]] = {}
        for _ in range(6):
            for row in (0, max(0, min(CALIBRATION_ROWS, self.max_positions - most))):
                for new in (1, 2, self.costs.free, self.costs.free + 1, most):
                    started = time.perf_counter()
                    self.forward([Slice(cache, [0] * new, range(row, row + new), row, logits=new)])
                    taken.setdefault((new, row + new), []).append(time.perf_counter() - started)
        # whatever else the machine does makes a forward slower, never faster
        self.costs.measured([(*kind, min(seconds)) for kind, seconds in taken.items()])

    def forward(self, slices: Sequence[Slice]) -> list[torch.Tensor]:
        """Compute the slices together; returns for each its `logits` last rows [logits, vocabulary].

        The caches' lengths move only when the forward has succeeded.
        """
        ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        spans: list[Span] = []
        for piece in slices:
            if len(piece.positions) != len(piece.ids) or not piece.ids:
                raise ValueError(f"a slice has {len(piece.ids)} ids and {len(piece.positions)} positions")
            piece.cache.reserve(piece.stop)
            ids += piece.ids
            positions += piece.positions
            keep += range(len(ids) - piece.logits, len(ids))
            if piece.adapter is not None:
                start = len(ids) - len(piece.ids)
                if spans and spans[-1][1:] == (start, piece.adapter):
                    start = spans.pop()[0]
                spans.append((start, len(ids), piece.adapter))
        with self._lock:  # several device loops may share a model
            started = time.perf_counter()
            self.adapted.rows, self.adapted.spans = len(ids), spans
            try:
                logits = self._call(ids, positions, torch.tensor(keep, dtype=torch.long), plan=slices)
            finally:
                self.adapted.spans = ()
            if logits.is_cuda and len(ids) <= self.costs.MOST_ROWS:
                torch.cuda.current_stream().synchronize()  # a token is about to be chosen from it anyway
            self.costs.observe(slices, time.perf_counter() - started)
        for piece in slices:
            piece.cache.extend(piece.stop - piece.drafted)
        self.forwards += 1
        self.tokens += len(ids)
        return list(torch.split(logits, [piece.logits for piece in slices]))


def refuse_untruncatable(config: Any) -> None:
    """Raise `ModelError`, naming the layer type, for a model whose cache cannot be cut at any row."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        raise ModelError(
            f"{config.model_type} has {', '.join(sorted(kinds))} layers, whose cache cannot be truncated; "
            "use a model with full attention in every layer"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise ModelError(
            f"{config.model_type} has a sliding window of {window} tokens, whose cache cannot be truncated; "
            "use a model with full attention in every layer"
        )
    if not getattr(config, "max_position_embeddings", None):
        raise ModelError(f"{config.model_type} states no max_position_embeddings; this architecture is not supported")
