"""What an evaluation keeps of a batch: prompts and answers for generation, the most likely tokens, rows in place."""

import torch
from torch.nn.utils.rnn import pad_sequence


IGNORED = -100


def prompts_and_answers(inputs: dict, pad_token_id: int) -> tuple[dict, torch.Tensor | None]:
    """
    The prompt of each row, which is all that stands before its last answer, padded on the left, with the videos; and
    these answers, padded on the right with -100. A row without labels is a prompt as a whole.
    """
    ids, labels = inputs["input_ids"], inputs.get("labels")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    is_label = torch.zeros_like(ids, dtype=torch.bool) if labels is None else labels != IGNORED
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    ends = (is_label * place).amax(1)
    starts = ((~is_label & (place <= ends[:, None])) * place).amax(1)
    starts = torch.where(ends > 0, starts, ids.shape[1]).tolist()
    prompts = [row[:start][of_row[:start] > 0] for row, of_row, start in zip(ids, mask, starts, strict=True)]
    videos = {name: inputs.get(name) for name in ("pixel_values_videos", "video_grid_thw")}
    prompt = {
        "input_ids": pad_sequence(prompts, True, pad_token_id, padding_side="left"),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in prompts], True, padding_side="left"),
        **{name: value for name, value in videos.items() if value is not None},
    }
    if labels is None:
        return prompt, None
    answers = [row[start:end] for row, start, end in zip(labels, starts, ends.tolist(), strict=True)]
    return prompt, pad_sequence(answers, True, IGNORED)


def most_likely(logits: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Logits → the most likely next token at each position. `kept` are the positions that have logits, if not all."""
    tokens = logits.argmax(-1)
    if kept is None:
        return tokens
    return torch.full_like(kept, IGNORED, dtype=tokens.dtype).masked_scatter(kept, tokens)


def in_place(rows: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """The rows of a batch at the places of their samples. A sample that was skipped gets a row of -100."""
    if kept is None:
        return rows
    whole = rows.new_full((len(kept), *rows.shape[1:]), IGNORED)
    whole[kept] = rows[: int(kept.sum())]  # where all were skipped, the row of their stand-in is left out
    return whole
