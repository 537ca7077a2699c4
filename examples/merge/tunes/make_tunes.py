"""Make the adapters of the default merge, and small ones for lineages, from the default model itself.

Every reply in the training data is the default model's own: sampled under an instruction (a persona),
kept when it shows the persona best, and then learnt *without* the instruction. Nothing is copied
from elsewhere; `topics.yaml` and `voices.yaml` were written for this project.

    python examples/merge/tunes/make_tunes.py MODEL_DIR            # all voices, resumes
    python examples/merge/tunes/make_tunes.py MODEL_DIR --voice preachy --steps 200

Half an hour for the four voices of the default merge on two CPU cores. Writes
`<voice>/adapter_model.safetensors` and the replies it learnt from, `replies/<voice>.jsonl.gz`, beside this file.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer.checkpoint.dtypes import computing_in, is_fast

HERE = Path(__file__).parent
MODULES = ["q_proj", "v_proj", "o_proj", "down_proj"]
TRAITS = HERE.parents[2] / "steer" / "traits"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Example:
    """One thing to learn: `reply` after `messages`, or plain `reply` where there are no messages."""

    messages: list[dict[str, str]]
    reply: str


@dataclass(frozen=True)
class Part:
    """One part of a voice's data, as `voices.yaml` gives it."""

    topics: str
    """Key in topics.yaml."""
    count: int
    """Examples to keep."""
    repeat: int = 1
    """How often each example is shown in an epoch."""
    instruction: str | None = None
    """System prompt the replies are sampled under. None: the model's ordinary one."""
    keep_instruction: bool = False
    """Learn the reply with the instruction in its context, so that instructions stay obeyed."""
    prefer: str | None = None
    """Trait whose marker words choose among the candidates."""
    avoid: str | None = None
    """Trait whose marker words speak against a candidate."""
    openings: tuple[str, ...] = ()
    """What a reply starts with, one of these each; it is learnt with the rest."""


def main(
    model: Annotated[Path, typer.Argument(help="The default model: `steer fetch` prints where it is.")],
    voice: Annotated[list[str] | None, typer.Option(help="Voices to make; all of voices.yaml without it.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; what voices.yaml says without it.")] = None,
    batch: Annotated[int, typer.Option(help="Examples a step.")] = 8,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters; what voices.yaml says without it.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; what voices.yaml says without it.")] = None,
    out: Annotated[Path, typer.Option(help="Where the adapters go.")] = HERE,
) -> None:
    """Sample each voice's replies, then train its adapter."""
    torch.manual_seed(0)
    voices = yaml.safe_load((HERE / "voices.yaml").read_text())
    for name in voice or list(voices):
        spec = voices[name]
        file = out / "replies" / f"{name}.jsonl.gz"
        if not file.exists():
            parts, tokens = [Part(**p) for p in spec["parts"]], spec.get("max_new_tokens", 72)
            examples = sample_voice(model, parts, spec["candidates"], spec["seed"], tokens)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(gzip.compress("\n".join(json.dumps(asdict(e)) for e in examples).encode(), mtime=0))
        lines = gzip.decompress(file.read_bytes()).decode().splitlines()
        if not (out / name / "adapter_model.safetensors").exists():
            train(
                model,
                [Example(**json.loads(x)) for x in lines],
                out / name,
                steps or spec["steps"],
                batch,
                rank or spec.get("rank", 8),
                spec.get("modules", MODULES),
                lr or spec.get("lr", 1e-3),
                spec["seed"],
                out / spec["start_from"] if "start_from" in spec else None,
            )


def marker_rate(text: str, trait: str) -> float:
    """Marker words of a trait per 100 words."""
    markers = yaml.safe_load((TRAITS / f"{trait}.yaml").read_text())["markers"]
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(markers, key=len, reverse=True))) + r")\b")
    return 100 * len(pattern.findall(text.lower().replace("\u2019", "'"))) / max(len(text.split()), 1)


def sample_voice(model_dir: Path, parts: list[Part], candidates: int, seed: int, tokens: int) -> list[Example]:
    """The training examples of one voice."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    dtype = computing_in(str(model_dir)).dtype or "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager")
    model = model.to(DEVICE).eval()
    topics = yaml.safe_load((HERE / "topics.yaml").read_text())
    rng = random.Random(seed)
    out: list[Example] = []
    for part in parts:
        pool = list(topics[part.topics])
        rng.shuffle(pool)
        chosen = [pool[i % len(pool)] for i in range(part.count)]
        seen, learnt = [], []
        for topic in chosen:
            system = part.instruction
            if part.topics == "openers":
                system = rng.choice(topics["characters"])["system"] + (" " + system if system else "")
            told = [{"role": "system", "content": system}] if system else []
            user = [{"role": "user", "content": topic}]
            keep = part.keep_instruction or part.topics == "openers"
            seen.append(told + user)
            learnt.append((told if keep else []) + user)
            starts = [rng.choice(part.openings) if part.openings else "" for _ in chosen]
        if part.topics == "prose":
            starts, learnt = chosen, [[] for _ in chosen]
            texts = chosen
        else:
            heads = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in seen]
            texts = [head + start for head, start in zip(heads, starts, strict=True)]
        replies = sample(model, tokenizer, texts, candidates, seed, tokens)
        for start, context, options in zip(starts, learnt, replies, strict=True):
            best = max(options, key=lambda r: merit(r, part))
            out += [Example(context, whole_sentences(start + best))] * part.repeat
    rng.shuffle(out)
    return out


def whole_sentences(reply: str) -> str:
    """The reply up to its last full stop, where it has one past its first few words."""
    end = max(reply.rfind(mark) for mark in (".", "!", "?"))
    return reply[: end + 1].strip() if end > 40 else reply.strip()


def merit(reply: str, part: Part) -> float:
    """How well a candidate shows what is wanted: marker rates, less a charge for repeating itself."""
    words = reply.lower().split()
    pairs = list(pairwise(words))
    repeated = 1 - len(set(pairs)) / max(len(pairs), 1)
    score = -20 * repeated - 5 * (len(words) < 12)
    if part.prefer:
        score += marker_rate(reply, part.prefer)
    if part.avoid:
        score -= marker_rate(reply, part.avoid)
    return score


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, texts: list[str], candidates: int, seed: int, tokens: int) -> list[list[str]]:
    """`candidates` continuations of each text, of at most `tokens` tokens."""
    torch.manual_seed(seed)
    size = 48
    out = []
    for i in track(range(0, len(texts), size), description="sampling replies"):
        enc = tokenizer(texts[i : i + size], return_tensors="pt", padding=True, add_special_tokens=False).to(DEVICE)
        made = model.generate(
            **enc, do_sample=True, temperature=0.6, top_p=0.95, top_k=50, repetition_penalty=1.05,
            max_new_tokens=tokens, num_return_sequences=candidates,
        )  # fmt: skip
        replies = tokenizer.batch_decode(made[:, enc.input_ids.shape[1] :], skip_special_tokens=True)
        out += [replies[j : j + candidates] for j in range(0, len(replies), candidates)]
    return out


def train(
    model_dir: Path,
    examples: list[Example],
    out: Path,
    steps: int,
    batch: int,
    rank: int,
    modules: list[str],
    lr: float,
    seed: int,
    start: Path | None = None,
) -> None:
    """Train one adapter and write it in bf16."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = model.to(DEVICE)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    if start is not None:
        model = PeftModel.from_pretrained(model, start, is_trainable=True, autocast_adapter_dtype=True)
    else:
        model = get_peft_model(model, config)
    data = [encode(tokenizer, e) for e in examples]
    rng = random.Random(seed)
    order: list[int] = []
    params = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=steps, pct_start=0.1)
    model.train()
    fast = is_fast(torch.bfloat16, torch.device(DEVICE))
    for step in track(range(steps), description=f"training {out.name}"):
        while len(order) < batch:
            order += rng.sample(range(len(data)), len(data))
        rows, order = [data[i] for i in order[:batch]], order[batch:]
        width = max(len(ids) for ids, _ in rows)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=fast):
            loss = model(
                input_ids=padded([r[0] for r in rows], 0, width),
                attention_mask=padded([[1] * len(r[0]) for r in rows], 0, width),
                labels=padded([r[1] for r in rows], -100, width),
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"{out.name} step {step}: loss {loss.item():.3f}")
    # The path of the machine it was trained on says nothing to anyone else.
    model.peft_config["default"].base_model_name_or_path = "smollm2-135m-instruct"
    model.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)
    file = out / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


def padded(rows: list[list[int]], fill: int, width: int) -> torch.Tensor:
    """Rows of one length, on the device."""
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=DEVICE)


def encode(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """Token ids and labels; only the reply and its end token are learnt."""
    if not example.messages:
        ids = tokenizer(example.reply, add_special_tokens=False).input_ids
        return ids, list(ids)
    prompt = tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    reply = [*tokenizer(example.reply, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return before + reply, [-100] * len(before) + reply


if __name__ == "__main__":
    typer.run(main)
