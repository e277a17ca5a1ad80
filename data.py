"""
Text in, ids out: tokenizers, chat templates, problem sets.

Everything that comes from a model folder is untrusted: templates render in jinja2's sandbox, and
nothing is evaluated or unpickled. What it does not know yet: tiktoken vocabularies, parquet and
hub data sets, tokenizers that are not byte-level.
"""
import json
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import torch
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HFTokenizer

from files import read_json
from model import snapshot
from runtime import UserError


@lru_cache
def byte_alphabet():
    """The byte-level alphabet of GPT-2 and its heirs: printable stand-in character -> byte."""
    plain = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """tokenizer.json of a Hugging Face folder, with its chat template and stop set.

    stop_ids: every id that ends an answer: the union of what config.json, generation_config.json
    and tokenizer_config.json call eos (models disagree among their own files).
    """
    def __init__(self, folder):
        file = Path(folder) / 'tokenizer.json'
        if not file.exists():
            raise UserError(f'{file}: no such file; the folder needs its tokenizer')
        try:
            self.hf = HFTokenizer.from_file(str(file))
        except Exception as e:               # `tokenizers` raises bare Exception
            raise UserError(f'{file}: not a tokenizer ({e}); fetch or make it again') from None
        settings = folder / 'tokenizer_config.json'
        special = read_json(settings) if settings.exists() else {}
        self.words = {k: special[k]['content'] if isinstance(special[k], dict) else special[k]
                      for k in ('bos_token', 'eos_token', 'pad_token') if special.get(k)}
        self.added = {i: t for i, t in self.hf.get_added_tokens_decoder().items()}
        self.stop_ids = set()
        for name in ('config.json', 'generation_config.json'):
            ids = read_json(folder / name).get('eos_token_id') if (folder / name).exists() else None
            self.stop_ids |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
        if 'eos_token' in self.words:
            self.stop_ids.add(self.hf.token_to_id(self.words['eos_token']))
        if not self.stop_ids - {None}:
            raise UserError(f'{folder}: no end-of-text token in config.json, generation_config.json or '
                            'tokenizer_config.json; answers would never end')
        self.stop_ids = sorted(self.stop_ids - {None})
        jinja = folder / 'chat_template.jinja'
        self.name = str(file)
        text = jinja.read_text(encoding='utf-8') if jinja.exists() else special.get('chat_template')
        if isinstance(text, list):           # several named templates
            text = next((t['template'] for t in text if t.get('name') == 'default'), None)
        self.template = self.compile(text) if text else None

    def __len__(self):
        return self.hf.get_vocab_size()

    def encode(self, text):
        """Text -> ids, nothing added."""
        return self.hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> text, special tokens left out."""
        return self.hf.decode(list(ids), skip_special_tokens=True)

    def render(self, messages, **variables):
        """Messages [{role, content}] (or one user's text) -> the prompt's text, up to where the
        assistant speaks. Without a template: the contents, one to a line."""
        if isinstance(messages, str):
            messages = [{'role': 'user', 'content': messages}]
        if not self.template:
            return self.words.get('bos_token', '') + '\n'.join(m['content'] for m in messages) + '\n'
        try:
            return self.template.render(messages=messages, add_generation_prompt=True, **self.words,
                                        **variables)
        except (TemplateError, TypeError) as e:
            raise UserError(f'{self.name}: its chat template failed ({e})') from None

    def compile(self, text):
        """A chat template, sandboxed, with the functions that published templates call."""
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        env.filters['tojson'] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        env.globals.update(raise_exception=refuse, strftime_now=lambda f: datetime.now().strftime(f))
        try:
            return env.from_string(text)
        except TemplateError as e:
            raise UserError(f'{self.name}: its chat template does not parse ({e})') from None

    def chat(self, messages, **variables):
        """Messages -> prompt ids. Special tokens in the rendered text become their ids."""
        return self.encode(self.render(messages, **variables))

    def byte_ends(self, ids):
        """Ids -> for each, how many bytes of text have been written after it (len(ids) numbers).
        Special tokens write none; a character split over tokens ends in the middle, exactly."""
        ends, n = [], 0
        for i in ids:
            if i in self.added:
                n += 0 if self.added[i].special else len(self.added[i].content.encode())
            else:
                token = self.hf.id_to_token(i) or ''
                bad = [ch for ch in token if ch not in byte_alphabet()]
                if bad:
                    raise UserError(f'{self.name}: token {i} {token!r} is not byte-level, so its bytes are '
                                    'not known; choose a model with a byte-level tokenizer')
                n += len(token)
            ends.append(n)
        return ends


def refuse(message):
    raise TemplateError(message)


def load_tokenizer(path_or_repo):
    """Tokenizer of a Hugging Face folder or hub id."""
    return Tokenizer(snapshot(path_or_repo))


# ---- problems -------------------------------------------------------------------------------

@dataclass(frozen=True)
class Problem:
    """A question with a known answer, and the prompt that asks it."""
    question: str | list        # a text, or messages
    answer: str                 # what the last box should hold
    ids: list[int]              # the prompt, chat-rendered


def load_problems(file, tokenizer, first=0):
    """A .jsonl file, {"question" or "problem": text, "answer": text} on each line -> [Problem].

    first: take so many; 0 = all. Raises UserError with file and line.
    """
    if not str(file).endswith('.jsonl') or not Path(file).is_file():
        raise UserError(f'{file}: no such .jsonl file')
    problems = []
    for number, line in enumerate(Path(file).read_bytes().split(b'\n'), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)           # bytes: not UTF-8 is a ValueError as well
            question, answer = row.get('question') or row['problem'], str(row['answer'])
            if not isinstance(question, (str, list)):
                raise ValueError(f'question is {question!r}, not a text')
        except (ValueError, KeyError, AttributeError) as e:
            raise UserError(f'{file}:{number}: {type(e).__name__}: {e}; '
                            'each line must be {"question": .., "answer": ..}') from None
        problems.append(Problem(question, answer, tokenizer.chat(question)))
        if not problems[-1].ids:
            raise UserError(f'{file}:{number}: the prompt renders to no token; mend it or the template')
        if len(problems) == first:
            break
    if not problems:
        raise UserError(f'{file}: no problems in it')
    return problems


def prompt_order(N, per_step, step, seed):
    """Indices of the prompts of a step (1, 2, ...): shuffled anew each epoch, every problem once an
    epoch. A function of its arguments alone, so resuming needs no saved state."""
    draws = range((step - 1) * per_step, step * per_step)
    return [permutation(N, seed, i // N)[i % N] for i in draws]


@lru_cache(maxsize=2)
def permutation(N, seed, epoch):
    g = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(N, generator=g).tolist()
