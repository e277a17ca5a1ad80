"""
Rewards for right answers as a further term of the loss: GRPO (arXiv 2402.03300).

    advantage of an answer     A = reward - mean of the rewards of the n answers to the same prompt,
                               with reward_scale=True divided by their standard deviation
    loss at a token y          -A log p(y)

The reward is 1 for an answer that the grader accepts, and 0 for any other. Weights, positions and
micro-batches are those of the other terms: Eq. (6)'s mean over each answer, or with loss_average='token' the
mean over all tokens.

Simpler than usual: no critic, no buffer and no clipping. Each rollout is used for one update, so the ratio
p / p_old, which GRPO clips, is 1, and clipping would change nothing. The KL to the start is not a part of
this term either: it is the output-space term opd='full' with teacher='self', and opd_weight is its factor.
What it does not do: rewards other than right or wrong. A run with rewards alone also loads the model that
teacher= names, because the diagnosis compares the student with it now and then.

    python distill.py configs/toy_rewards.py                                           rewards alone
    python distill.py configs/toy_rewards.py oprd_weight=1 reward_weight=0.1 lr=1e-3   beside Eq. (6)

Letters: B answers, K supervised positions, C of them in a chunk, V vocabulary.
"""
from dataclasses import dataclass

import torch

from output_losses import HeadLoss, HeadRows, Vocabulary
from support.runtime import all_reduce


def advantages(rewards, n, scale=True):
    """Rewards (B,) of answers, n in a row to each prompt -> advantages (B,). scale: divide by the standard
    deviation of the n (GRPO); False: do not (as in Dr. GRPO, arXiv 2503.20783)."""
    groups = rewards.view(-1, n)                                             # (prompts, n)
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        deviation = centred.square().mean(1, keepdim=True).sqrt()            # (prompts, 1)
        centred = centred / (deviation + 1e-6)
    return centred.flatten()


def shared_advantages(cfg, verdicts, mine, device):
    """`advantages` of this rank's answers (B,), where the n answers to a prompt may be on different ranks.

    verdicts: of this rank's answers, True or False. mine: their numbers among those of the step.
    """
    mine = torch.tensor(mine, device=device)
    rewards = torch.zeros(cfg['prompts_per_step'] * cfg['n'], device=device)
    rewards[mine] = torch.tensor(verdicts, dtype=torch.float32, device=device)
    return advantages(all_reduce(rewards), cfg['n'], cfg['reward_scale'])[mine]


@dataclass
class PolicyGradient(Vocabulary):
    """REINFORCE: -log p of the next token. The weight of a row has been multiplied by the advantage of its
    answer, a constant, which may be negative."""
    def loss_and_gradient(self, logp, batch, piece):
        """log p (C, V) -> -log p of the next token (C,), the gradient of the weight times it with respect to
        the logits (C, V), and no statistics: zeros (4, C)."""
        next_token = batch.next_token[piece, None]                           # (C, 1)
        value = -logp.gather(-1, next_token).squeeze(-1)                     # (C,)

        # The gradient of -log p(y) is p - 1 at y and p at every other token.
        gradient = logp.exp_()
        gradient.scatter_add_(-1, next_token, -torch.ones_like(value)[:, None])
        gradient.mul_(batch.weights[piece, None])
        return value, gradient, value.new_zeros(4, len(value))


class RewardTerm:
    """Rewards of whole answers as a term of the training loss. It has no teacher."""
    def __init__(self, temperature, head_rows, vocab):
        """temperature: the student's in the loss. head_rows, vocab: see output_losses.Vocabulary."""
        self.objective = PolicyGradient(temperature=temperature, chunk=head_rows, vocab=vocab)

    def __call__(self, student_head, h, rows):
        """Student states (K, d) at rows.at -> the loss."""
        batch = HeadRows(None, None, rows.next_token, rows.weights * rows.advantage, rows.answer,
                         rows.inside, None)
        loss, _ = student_head(h, lambda h, W: HeadLoss.apply(h, W, self.objective, batch))
        return loss
