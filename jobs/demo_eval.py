"""How well a small base takes up the demo task: exact match bare, and with a LoRA delta trained on a few examples.

Apart from the project's own training path on purpose: plain PyTorch, so that it runs where only transformers is
installed, and so that the base is judged by something other than the code that it is made for.
Shapes: B rows, T tokens, I inputs, O outputs, R rank.
"""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orchestrator.data.demo import demo_records

_NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803,
        0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip


class Outcome(NamedTuple):
    """What one evaluation found."""

    bare: float
    """Exact match of the base alone, 0 to 1."""
    tuned: float
    """Exact match with the delta, 0 to 1."""
    seconds: float
    """Time that training took."""
    loss: float
    """Mean loss of the last ten steps."""


class Lora(nn.Module):
    """A frozen linear layer with y = W x + (alpha / R) B A x."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.a_RI = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.b_OR = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.a_RI, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] to [.., O]."""
        out: Tensor = self.linear(x) + F.linear(F.linear(x, self.a_RI), self.b_OR) * self.scale
        return out


@torch.no_grad()
def round_nf4(weight_OI: Tensor) -> Tensor:
    """``weight_OI`` rounded to 4-bit NormalFloat in blocks of 64, as an NF4 base would hold it."""
    levels = torch.tensor(_NF4, device=weight_OI.device)
    blocks = weight_OI.float().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
    middles = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(blocks / scale, middles)] * scale).reshape(weight_OI.shape)


def _linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and name != "lm_head"
    ]


def exact_match(model: Any, tokenizer: Any, records: list[dict[str, str]], show: int = 0) -> float:
    """Share of ``records`` whose greedy answer in chat form is the completion, blanks at the ends aside."""
    tokenizer.padding_side = "left"
    hits = 0
    for start in range(0, len(records), 256):
        part = records[start : start + 256]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": r["prompt"]}], tokenize=False, add_generation_prompt=True
            )
            for r in part
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        with torch.no_grad():
            out_BT = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=96,
                do_sample=False,
            )
        answers = tokenizer.batch_decode(out_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        hits += sum(a.strip() == r["completion"].strip() for a, r in zip(answers, part, strict=True))
        for record, answer in list(zip(part, answers, strict=True))[: show if start == 0 else 0]:
            print(f"    {record['prompt']}\n      want {record['completion']}\n      got  {answer}")
    return hits / len(records)


def _batch(tokenizer: Any, records: list[dict[str, str]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and labels, each [B, T]; only the answers are targets."""
    rows: list[tuple[list[int], int]] = []
    for r in records:
        ask = f"<|im_start|>user\n{r['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        head = tokenizer(ask, add_special_tokens=False)["input_ids"]
        rows.append(
            (head + tokenizer(r["completion"] + "<|im_end|>", add_special_tokens=False)["input_ids"], len(head))
        )
    length = max(len(row) for row, _ in rows)
    tokens_BT = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels_BT = torch.full((len(rows), length), -100)
    mask_BT = torch.zeros((len(rows), length), dtype=torch.long)
    for i, (row, head_size) in enumerate(rows):
        tokens_BT[i, : len(row)] = torch.tensor(row)
        labels_BT[i, head_size : len(row)] = torch.tensor(row[head_size:])
        mask_BT[i, : len(row)] = 1
    return tokens_BT.to(device), mask_BT.to(device), labels_BT.to(device)


def evaluate(
    path: str,
    *,
    device: str = "cpu",
    steps: int = 80,
    batch: int = 16,
    rate: float = 5e-3,
    rank: int = 16,
    held_out: int = 200,
    nf4: bool = True,
    seed: int = 0,
    show: int = 0,
) -> Outcome:
    """Exact match of the model in ``path`` on held-out demo records, bare and after ``steps`` of LoRA in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    model.requires_grad_(False)
    for _, _, linear in _linears(model):
        if nf4:
            linear.weight.data = round_nf4(linear.weight.data)
    test = demo_records("test", held_out, seed)
    bare = exact_match(model, tokenizer, test, show)
    for parent, name, linear in _linears(model):
        setattr(parent, name, Lora(linear, rank, 2.0 * rank))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    records = demo_records("train", steps * batch, seed)
    losses: list[float] = []
    begin = time.perf_counter()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 5) * (1 - step / steps)
        part = records[step * batch : (step + 1) * batch]
        tokens_BT, mask_BT, labels_BT = _batch(tokenizer, part, model.device)
        loss = model(input_ids=tokens_BT, attention_mask=mask_BT, labels=labels_BT).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - begin
    tuned = exact_match(model, tokenizer, test, show)
    return Outcome(bare, tuned, seconds, sum(losses[-10:]) / len(losses[-10:]))
