"""
Text in, ids out: tokenizers, chat templates, problem sets.

Everything that comes from a model folder or a data set is untrusted: templates render in jinja2's
sandbox, and nothing is evaluated or unpickled. What it does not know yet: tokenizers that are not
byte-level (their byte offsets), tool calls in templates.
"""
import base64
import json
import unicodedata
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import accumulate

import tiktoken
from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HFTokenizer

from formats.huggingface import snapshot
from support.files import read_json
from support.runtime import UserError


@lru_cache
def byte_alphabet():
    """The byte-level alphabet of GPT-2 and its heirs: printable stand-in character -> byte."""
    plain = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


# ---- vocabularies: two libraries, one face ----------------------------------------------------

class JsonVocabulary:
    """A tokenizer.json, through `tokenizers`."""
    def __init__(self, file):
        try:
            self.core = HFTokenizer.from_file(str(file))
        except Exception as e:               # `tokenizers` raises bare Exception
            raise UserError(f'{file}: not a tokenizer ({e}); fetch or make it again') from None
        self.core.no_truncation()            # published files carry leftovers of somebody's training
        self.core.no_padding()
        self.added = self.core.get_added_tokens_decoder()
        self.special = {i for i, t in self.added.items() if t.special}

    def encode(self, text, special=True):
        self.core.encode_special_tokens = not special    # the library's word for "as ordinary text"
        return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.core.decode(ids, skip_special_tokens=True)

    def normal(self, text):
        return self.core.normalizer.normalize_str(text) if self.core.normalizer else text

    def words(self):
        """{bytes the token stands for: id}; a token that is not byte-level keeps its string."""
        alphabet, out = byte_alphabet(), {}
        for word, i in self.core.get_vocab().items():
            if i in self.added:
                out[word.encode()] = i
            elif all(ch in alphabet for ch in word):
                out[bytes(alphabet[ch] for ch in word)] = i
            else:
                out[word] = i
        return out


# What a .tiktoken file does not say: how many ranks it has, how text is cut before merging, the special
# tokens, and the Unicode form the text is brought into first.
QWEN_CUT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r'|\s*[\r\n]+|\s+(?!\S)|\s+')
LOWER, UPPER = r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]', r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]'
END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_CUT = (rf'[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{END}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{END}'
             r'|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+')
TIKTOKEN = {
    'qwen.tiktoken': (151_643, QWEN_CUT, {'<|endoftext|>': 151643, '<|im_start|>': 151644,
                                          '<|im_end|>': 151645}, 'NFC'),
    'o200k_base.tiktoken': (199_998, O200K_CUT, {'<|endoftext|>': 199999, '<|endofprompt|>': 200018}, None),
}


class TiktokenVocabulary:
    """A .tiktoken file of a known vocabulary, through `tiktoken`."""
    def __init__(self, file):
        if file.name not in TIKTOKEN:
            raise UserError(f'{file}: how it cuts its text is not known; known: {", ".join(TIKTOKEN)}')
        count, cut, special, self.form = TIKTOKEN[file.name]
        try:
            pairs = (line.split() for line in file.read_bytes().splitlines() if line)
            self.ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        except ValueError as e:
            raise UserError(f'{file}: not a tiktoken file ({e}); fetch it again') from None
        if len(self.ranks) != count:
            raise UserError(f'{file}: {len(self.ranks)} tokens, but this vocabulary has {count}; '
                            'fetch it again')
        self.core = tiktoken.Encoding(file.stem, pat_str=cut, mergeable_ranks=self.ranks,
                                      special_tokens=special)
        self.special = set(special.values())

    def encode(self, text, special=True):
        text = self.normal(text)
        return self.core.encode(text, allowed_special='all') if special else self.core.encode_ordinary(text)

    def normal(self, text):
        return unicodedata.normalize(self.form, text) if self.form else text

    def decode(self, ids):
        return self.core.decode([i for i in ids if i < len(self.ranks)])     # the others write nothing

    def words(self):
        special = self.core.special_tokens_set
        return self.ranks | {w.encode(): self.core.encode_single_token(w) for w in special}


class Tokenizer:
    """The vocabulary of a Hugging Face folder, with its chat template (whose `variables` are set once,
    such as enable_thinking) and stop set.

    stop_ids: every id that ends an answer: the union of what config.json, generation_config.json
    and tokenizer_config.json call eos (models disagree among their own files).
    """
    def __init__(self, folder, **variables):
        self.variables = variables
        file = folder / 'tokenizer.json'
        other = sorted(folder.glob('*.tiktoken'))
        if not file.exists() and not other:
            raise UserError(f'{file}: no such file, and no .tiktoken file; the folder needs its tokenizer')
        self.name = str(file if file.exists() else other[0])
        self.vocabulary = JsonVocabulary(file) if file.exists() else TiktokenVocabulary(other[0])
        self.words = self.vocabulary.words()                                 # {bytes: id}
        self.size = max(self.words.values()) + 1     # ids it knows; a model's V is often rounded up from it

        settings = folder / 'tokenizer_config.json'
        special = read_json(settings) if settings.exists() else {}
        self.marks = {k: special[k]['content'] if isinstance(special[k], dict) else special[k]
                      for k in ('bos_token', 'eos_token', 'pad_token') if special.get(k)}
        stops = [self.words.get(str(self.marks.get('eos_token', '')).encode())]
        for name in ('config.json', 'generation_config.json'):
            ids = read_json(folder / name).get('eos_token_id') if (folder / name).exists() else None
            stops += ids if isinstance(ids, list) else [ids]
        self.stop_ids = sorted({i for i in stops if isinstance(i, int)})
        if not self.stop_ids:
            raise UserError(f'{folder}: no end-of-text token in config.json, generation_config.json or '
                            'tokenizer_config.json; answers would never end')

        jinja = folder / 'chat_template.jinja'
        text = jinja.read_bytes().decode(errors='replace') if jinja.exists() else special.get('chat_template')
        if isinstance(text, list):           # several named templates
            text = {t['name']: t['template'] for t in text}.get('default')
        self.template = self.compile(text) if text else None

    def encode(self, text, special=True):
        """Text -> ids, nothing added; special tokens written in the text become their ids, or with
        special=False stay the text that they are."""
        return self.vocabulary.encode(text, special)

    def normal(self, text):
        """The Unicode form of a text that `encode` cuts into tokens (Qwen: NFC)."""
        return self.vocabulary.normal(text)

    def decode(self, ids):
        """Ids -> text, special tokens left out."""
        return self.vocabulary.decode([i for i in ids if i < self.size])

    def render(self, messages):
        """Messages [{role, content}] (or one user's text) -> the prompt's text, up to where the
        assistant speaks. Without a template: the contents, one to a line."""
        if isinstance(messages, str):
            messages = [{'role': 'user', 'content': messages}]
        if not self.template:
            return self.marks.get('bos_token', '') + '\n'.join(m['content'] for m in messages) + '\n'
        try:
            return self.template.render(messages=messages, add_generation_prompt=True, tools=None,
                                        documents=None, **self.marks, **self.variables)
        except Exception as e:               # the template is somebody else's program
            raise UserError(f'{self.name}: its chat template failed ({e})') from None

    def compile(self, text):
        """A chat template, sandboxed, with the functions that published templates call."""
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=['jinja2.ext.loopcontrols', GenerationTag])
        env.filters['tojson'] = lambda x, **how: json.dumps(x, **{'ensure_ascii': False, **how})
        env.globals.update(raise_exception=refuse, strftime_now=lambda f: datetime.now().strftime(f))
        try:
            return env.from_string(text)
        except (TemplateError, TypeError, AttributeError) as e:
            raise UserError(f'{self.name}: its chat template does not parse ({e})') from None

    def chat(self, messages):
        """Messages -> prompt ids. Special tokens in the rendered text become their ids."""
        return self.encode(self.render(messages))

    @cached_property
    def pieces(self):
        """The bytes of text that each id writes: [bytes]; special tokens write none."""
        out = [b''] * self.size
        for word, i in self.words.items():
            if isinstance(word, str):
                raise UserError(f'{self.name}: token {i} {word!r} is not byte-level, so its bytes are '
                                'not known; choose a model with a byte-level tokenizer')
            out[i] = b'' if i in self.vocabulary.special else word
        return out

    def byte_ends(self, ids):
        """Ids -> for each, how many bytes of text have been written after it (len(ids) numbers).
        A character split over tokens ends in the middle, exactly."""
        return list(accumulate(len(self.pieces[i]) for i in ids))


class GenerationTag(Extension):
    """{% generation %} .. {% endgeneration %} marks what an assistant wrote, for training masks; the
    text is the same with and without it."""
    tags = {'generation'}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(['name:endgeneration'], drop_needle=True)


def refuse(message):
    raise TemplateError(message)


def check_ids(name, V, tokenizer):
    """A model whose embedding has fewer rows than the tokenizer has ids is a UserError."""
    if tokenizer.size > V:
        raise UserError(f'{name}: {V} rows in its embedding, but token ids up to {tokenizer.size - 1} in '
                        f'{tokenizer.name}; tokenizer and model do not belong together')


def load_tokenizer(path_or_repo, **variables):
    """Tokenizer of a Hugging Face folder or hub id; variables go to its chat template."""
    return Tokenizer(snapshot(path_or_repo), **variables)
