"""GRPO in one file: the whole algorithm, nothing hidden, no import of gruppo.

    pip install torch transformers
    python examples/nano.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 30

Trains a small chat model to add numbers inside <answer> tags. What it is not: fast (prompts are
computed once per completion, everything is padded), resumable, or able to tell what goes wrong.
The library does the same mathematics; a test holds the two equal.

Shapes: P prompts, G completions each, B = P·G rows, T completion positions, V vocabulary.
"""

import argparse
import random
import re

import torch
from torch import Tensor

SYSTEM = "You are a calculator."
EXAMPLE = ("3 + 14", "<think>3 + 14 = 17</think><answer>17</answer>")
LAYOUT = re.compile(r"\s*<think>.*?</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


# ------------------------------------------------------------------ the task: prompt and reward
def make_problem(rng: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    return f"{a} + {b}", str(a + b)


def reward(text: str, answer: str) -> float:
    """0.2 for the layout, 0.8 more for the right answer in it."""
    match = LAYOUT.fullmatch(text)
    if match is None:
        return 0.0
    return 0.2 + 0.8 * (match.group(1).strip() == answer)


# ------------------------------------------------------------------ the algorithm, as formulas
def group_advantage(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """A = (r - mean) / (std + eps) within each group; rewards [P, G] (arXiv:2402.03300, §4.1.2).

    A group whose rewards are all equal has no signal: exactly 0, not rounding noise / eps.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    dead = rewards.amax(dim=1) - rewards.amin(dim=1) <= 1e-6
    return (centred / (rewards.std(dim=1, keepdim=True) + eps)).masked_fill(dead[:, None], 0.0)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
) -> Tensor:
    """Clipped surrogate, mean over all trained tokens (arXiv:2503.14476, eq. 8).

    logp, old_logp, mask [B, T]; advantage [B]. Selection under the mask comes before exp, so that
    garbage in padding cannot become NaN.
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    loss = -torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    return torch.where(mask, loss, 0.0).sum() / mask.sum()


def kl_loss(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """k3 = exp(ref - logp) - 1 - (ref - logp), mean over tokens (arXiv:2402.03300, eq. 4)."""
    gap = torch.where(mask, ref_logp - logp, 0.0).clamp(-20, 20)
    return (gap.exp() - 1 - gap).sum() / mask.sum()


def completion_logp(model, ids: Tensor, attention: Tensor, start: int, tau: float = 1.0) -> Tensor:
    """Log-probability of each completion token, [B, T]; logits at t - 1 predict token t."""
    logits = model(input_ids=ids, attention_mask=attention).logits[:, start - 1 : -1]  # [B, T, V]
    logits = logits.float() / tau  # as it was sampled
    return logits.log_softmax(dim=-1).gather(-1, ids[:, start:, None])[..., 0]


# ------------------------------------------------------------------ one step
def sample(model, tokenizer, prompts: list[str], group_size: int, max_new: int) -> dict:
    """Draw a group of completions for each prompt; rows in group order."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    batch = {name: value.repeat_interleave(group_size, dim=0) for name, value in batch.items()}
    with torch.no_grad():
        ids = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new
        )
    start = batch["input_ids"].shape[1]
    tokens = ids[:, start:]  # [B, T]
    ended = (tokens == tokenizer.eos_token_id).cumsum(dim=1)
    # the first end token is trained; what comes after it is padding
    mask = (ended == 0) | ((ended == 1) & (tokens == tokenizer.eos_token_id))
    attention = torch.cat([batch["attention_mask"], mask.long()], dim=1)
    texts = [
        tokenizer.decode(row[keep], skip_special_tokens=True)
        for row, keep in zip(tokens, mask, strict=True)
    ]
    return {"ids": ids, "attention": attention, "mask": mask, "start": start, "texts": texts}


def step(model, reference, tokenizer, optimizer, rng: random.Random, args) -> dict[str, float]:
    """Prompt → rollout → reward → advantage → loss → update."""
    problems = [make_problem(rng) for _ in range(args.prompts)]
    prompts = [chat(tokenizer, question) for question, _ in problems]
    rolled = sample(model, tokenizer, prompts, args.group, args.max_new)
    rewards = torch.tensor(
        [reward(text, problems[row // args.group][1]) for row, text in enumerate(rolled["texts"])]
    ).view(args.prompts, args.group)
    advantage = group_advantage(rewards).flatten()  # [B]

    ids, attention, start, mask = (rolled[k] for k in ("ids", "attention", "start", "mask"))
    with torch.no_grad():
        ref_logp = completion_logp(reference, ids, attention, start) if args.beta else None
    old_logp = None
    for _ in range(args.inner_epochs):
        logp = completion_logp(model, ids, attention, start)
        # the first update is on-policy: the old policy is the live one, and the ratio is 1
        old_logp = logp.detach() if old_logp is None else old_logp
        loss = policy_loss(logp, old_logp, advantage, mask)
        if ref_logp is not None:
            loss = loss + args.beta * kl_loss(logp, ref_logp, mask)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    live = (rewards.amax(1) > rewards.amin(1)).float().mean()
    return {"reward": float(rewards.mean()), "live groups": float(live), "grad norm": float(norm)}


def chat(tokenizer, question: str) -> str:
    """The prompt: a system message, one worked example, the question."""
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": EXAMPLE[0]},
        {"role": "assistant", "content": EXAMPLE[1]},
        {"role": "user", "content": question},
    ]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def main() -> None:
    """Train, and print one line a step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step (P)")
    parser.add_argument("--group", type=int, default=8, help="completions a prompt (G)")
    parser.add_argument("--max-new", type=int, default=32, help="tokens a completion")
    parser.add_argument("--inner-epochs", type=int, default=1, help="updates a rollout (mu)")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the KL penalty")
    args = parser.parse_args()

    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    reference = None
    if args.beta:
        reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    for number in range(1, args.steps + 1):
        shown = step(model, reference, tokenizer, optimizer, rng, args)
        print(f"step {number:3d}  " + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()))


if __name__ == "__main__":
    main()
