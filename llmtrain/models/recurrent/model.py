"""Recurrent networks: language models (Zaremba et al., arXiv:1409.2329) and readers of whole texts.

Dim names: B batch, T sequence, D hidden width, W width of what a head reads (2 D if bidirectional), V
vocabulary, N heads of the attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.models.recurrent.attention import make_attention
from llmtrain.models.recurrent.cells import Cells, Documents, Reversal, State, make_cells
from llmtrain.models.recurrent.config import RecurrentConfig
from llmtrain.nn.carried import CarriedStates
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.head import LanguageModelHead, TiedHeadModel, count_correct
from llmtrain.nn.initialize import Initializer, Uniform
from llmtrain.nn.task_head import TaskHead, make_task_head
from llmtrain.nn.transformer import asked_states


class RecurrentCache:
    """States after the tokens seen so far, for generation."""

    def __init__(self) -> None:
        self.length = 0
        self.states: list[State] = []
        """Of each layer, (1, B, D) each; empty before the first token."""

    def select(self, rows_R: Tensor) -> None:
        """Keep only these rows, in this order; a row may occur several times."""
        self.states = [tuple(part[:, rows_R] for part in state) for state in self.states]

    reorder = select


class RecurrentModel(TiedHeadModel):
    """Token ids → logits, or the summed loss. `config.vocab_size` must be resolved."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_width)
        self.dropout = Dropout(config.dropout, -1, HIDDEN)
        self.layers = nn.ModuleList(map(self._cells, config.input_widths))
        if config.bidirectional:
            self.reversed_layers = nn.ModuleList(map(self._cells, config.input_widths))
        self.layer_dropouts = nn.ModuleList(
            Dropout(config.dropout, layer, HIDDEN) for layer in range(config.num_layers)
        )
        self.attention = make_attention(config)
        self.carried: CarriedStates | None = None
        if config.task is not None:
            self.head: nn.Module = make_task_head(config.task, config.output_width)
        elif config.reads_whole_texts:
            raise ValueError("a language model must not see what it predicts")
        else:
            self.head = LanguageModelHead(config.hidden_size, config.vocab_size)
        self._tie()

    def _cells(self, width: int) -> Cells:
        config = self.config
        return make_cells(config.family, width, config.hidden_size, getattr(config, "nonlinearity", "tanh"))

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        labels_BT: Tensor | None = None,
        cache: RecurrentCache | None = None,
        dropout_keys_B: Tensor | None = None,
        last_only: bool = False,
        lengths_B: Tensor | None = None,
        with_metrics: bool = False,
        asked_BM: Tensor | None = None,
        lanes_B: Tensor | None = None,
        places_B: Tensor | None = None,
        ends_B: Tensor | None = None,
    ) -> Any:
        """Return logits (B, T, V); with labels, the SUM of cross-entropy in nats, 0-d fp32. With a task head,
        which needs lengths_B, the tokens of each row: its logits or, with labels of its task, its loss.

        positions_BT: accepted as by decoders, but ignored.
        documents_BT: number of each token's document; each is read from a state of zeros. None: a row is
            one text.
        dropout_keys_B: keys from which dropout masks are generated; None: torch's generator. Dropout applies
            between layers, never between tokens.
        last_only: return logits of the last token only, (B, 1, V).
        with_metrics: with labels, return sums by name: "loss" and "correct" predictions.
        asked_BM: positions whose logits are returned, (B, M, V); None: all.
        lanes_B, places_B, ends_B: in training steps whose rows go on from those before, the arguments of
            CarriedStates, from which rows begin and which keeps where they end. None: rows begin from zeros.
        """
        if isinstance(self.head, TaskHead):
            assert lengths_B is not None
            states_BTW = self._read(tokens_BT, lengths_B, dropout_keys_B)
            return self.head(*self._summary(states_BTW, lengths_B), labels_BT, dropout_keys_B)
        if lanes_B is not None and self.carried is not None:
            assert places_B is not None
            assert ends_B is not None
            x_BTD = self._carry_on(tokens_BT, documents_BT, dropout_keys_B, lanes_B, places_B, ends_B)
        else:
            x_BTD = self._continue(tokens_BT, documents_BT, cache, dropout_keys_B)
        x_BTD = asked_states(x_BTD, asked_BM)
        logits_or_loss: Tensor = self.head(x_BTD[:, -1:] if last_only else x_BTD, labels_BT)
        if labels_BT is None or not with_metrics:
            return logits_or_loss
        return {"loss": logits_or_loss, "correct": count_correct(self.head, x_BTD, labels_BT)}

    def _continue(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None,
        cache: RecurrentCache | None,
        dropout_keys_B: Tensor | None,
    ) -> Tensor:
        """Return the hidden states of tokens that follow those of the cache, and advance it."""
        before: list[Any] = [None] * len(self.layers)
        if cache is not None:
            before = cache.states or [self._zeros(len(tokens_BT))] * len(self.layers)
        documents = None if documents_BT is None else Documents(documents_BT, goes_on=cache is not None)
        after: list[Any] = []
        x_BTD = self.dropout(self.embedding(tokens_BT), dropout_keys_B)
        for layer, dropout, state in zip(self.layers, self.layer_dropouts, before, strict=True):
            x_BTD, state = layer(x_BTD, state, documents)
            after.append(state)
            x_BTD = dropout(x_BTD, dropout_keys_B)
        if cache is not None:
            cache.states = after
            cache.length += tokens_BT.shape[1]
        return x_BTD

    def _zeros(self, B: int) -> State:
        """Return the state that texts begin from."""
        zeros = self.embedding.weight.new_zeros(1, B, self.config.hidden_size)
        return (zeros, zeros) if self.config.gates == 4 else (zeros,)

    def carry_states(self, rows: int, device: torch.device) -> None:
        """From now on, carry the states of so many rows from training step to training step."""
        self.carried = CarriedStates(rows, self.config.state_width, device)

    def _carry_on(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None,
        dropout_keys_B: Tensor | None,
        lanes_B: Tensor,
        places_B: Tensor,
        ends_B: Tensor,
    ) -> Tensor:
        """Return the hidden states of rows that begin from carried states, and keep those after them."""
        assert self.carried is not None
        parts = self.carried.before(lanes_B, places_B).unflatten(
            1, (len(self.layers), -1, self.config.hidden_size)
        )
        cache = RecurrentCache()
        cache.states = [
            tuple(part[None].contiguous() for part in layer.unbind(1)) for layer in parts.unbind(1)
        ]
        x_BTD = self._continue(tokens_BT, documents_BT, cache, dropout_keys_B)
        after = [torch.stack([part[0] for part in state], dim=1) for state in cache.states]
        self.carried.keep(lanes_B, places_B, torch.stack(after, dim=1).flatten(1), ends_B)
        return x_BTD

    def _read(self, tokens_BT: Tensor, lengths_B: Tensor, dropout_keys_B: Tensor | None) -> Tensor:
        """Return the hidden states of whole texts, (B, T, W): those of the forward direction, and then those
        of the reversed, if there is one."""
        reverse = Reversal(lengths_B, tokens_BT.shape[1])
        x_BTW = self.dropout(self.embedding(tokens_BT), dropout_keys_B)
        for i, (layer, dropout) in enumerate(zip(self.layers, self.layer_dropouts, strict=True)):
            states, _ = layer(x_BTW)
            if self.config.bidirectional:
                from_end, _ = self.reversed_layers[i](reverse(x_BTW))
                states = torch.cat((states, reverse(from_end)), dim=-1)
            x_BTW = dropout(states, dropout_keys_B)
        return x_BTW

    def _summary(self, states_BTW: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states that the task head pools, and how many there are of each text: with attention,
        or if the last state of each direction is asked for, a single one."""
        task = self.config.task
        assert task is not None
        takes_last = task.pooling == "last" and task.is_of_whole_texts
        if self.attention is not None:
            pooled_BW, _ = self._attended(states_BTW, lengths_B)
        elif self.config.bidirectional and takes_last:
            pooled_BW = self._final(states_BTW, lengths_B)
        else:
            return states_BTW, lengths_B
        return pooled_BW[:, None], torch.ones_like(lengths_B)

    def _attended(self, states_BTW: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        assert self.attention is not None
        is_token_BT = torch.arange(states_BTW.shape[1], device=lengths_B.device) < lengths_B[:, None]
        found: tuple[Tensor, Tensor] = self.attention(
            states_BTW, self._final(states_BTW, lengths_B), is_token_BT
        )
        return found

    def _final(self, states_BTW: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the last state of each direction, (B, W): that of the last token, and of the first."""
        rows_B = torch.arange(len(states_BTW), device=states_BTW.device)
        last_BW = states_BTW[rows_B, (lengths_B - 1).clamp(min=0)]
        D = self.config.hidden_size
        return torch.cat((last_BW[:, :D], states_BTW[:, 0, D:]), dim=-1)

    def attention_weights(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor | None:
        """Return the weight that each token has in the vector of its text, (B, N, T) fp32, 0 at padding; None
        without attention."""
        if self.attention is None:
            return None
        return self._attended(self._read(tokens_BT, lengths_B, None), lengths_B)[1]

    def levels(self) -> list[list[str]]:
        """Return the names of modules by depth: embedding, each layer, head; see HasLevels."""
        sides = ["layers", *(["reversed_layers"] if self.config.bidirectional else [])]
        layers = [[f"{side}.{i}" for side in sides] for i in range(len(self.layers))]
        has_parameters = self.config.attention_parameter_count > 0
        return [["embedding"], *layers, [*(["attention"] if has_parameters else []), "head"]]

    def new_cache(self, max_length: int) -> RecurrentCache:
        """Return an empty state, whose size does not depend on the length."""
        return RecurrentCache()

    def initializers(self) -> dict[str, Initializer]:
        """Return the initialization.

        | parameter                                      | value                  |
        |------------------------------------------------|------------------------|
        | embedding, head (if untied), cells, attention  | uniform ±1/sqrt(D)     |
        """
        uniform = Uniform(self.config.hidden_size**-0.5)
        table: dict[str, Initializer] = {"embedding.weight": uniform, "layers.*": uniform}
        if self.config.bidirectional:
            table["reversed_layers.*"] = uniform
        if self.config.attention_parameter_count:
            table["attention.*"] = uniform
        if isinstance(self.head, TaskHead):
            of_head = self.head.initializers(0.0)
            table |= {
                name: uniform if name.endswith((".weight", ".bias")) else of_head[name] for name in of_head
            }
        elif not self.config.tie_embeddings:
            table["head.weight"] = uniform
        return table
