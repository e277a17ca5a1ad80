"""
Text in, ids out: tokenizers with their chat templates, and the rule for "the same vocabulary".

Simpler than usual: a tokenizer is a vocabulary (a tokenizer.json or a .tiktoken file), a template, and the
set of ids that end an answer. Padding, truncation and batches do not exist here.

Everything in a model folder is untrusted: templates render in jinja2's sandbox, and nothing is evaluated or
unpickled. What it does not do: byte offsets of tokenizers that are not byte-level, tool calls in templates,
.tiktoken files other than the two in TIKTOKEN.
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
    """The byte-level alphabet of GPT-2 and its successors: {printable stand-in character: byte}."""
    # A byte that is a printable character stands for itself.
    printable = []
    for first, last in ('!~', '¡¬', '®ÿ'):
        printable += range(ord(first), ord(last) + 1)
    alphabet = {chr(byte): byte for byte in printable}

    # The others get the characters from 256 on, in order.
    for byte in range(256):
        if byte not in printable:
            alphabet[chr(256 + len(alphabet) - len(printable))] = byte
    return alphabet


# ---- vocabularies: two libraries behind the same five methods ---------------------------------

class JsonVocabulary:
    """A tokenizer.json, read by the library `tokenizers`."""
    def __init__(self, file):
        try:
            self.core = HFTokenizer.from_file(str(file))
        except Exception as error:           # `tokenizers` raises bare Exception
            raise UserError(f'{file}: not a tokenizer ({error}); fetch or make it again') from None

        # Published files keep truncation and padding from somebody's training.
        self.core.no_truncation()
        self.core.no_padding()
        self.added = self.core.get_added_tokens_decoder()
        self.special = {number for number, token in self.added.items() if token.special}

    def encode(self, text, special=True):
        self.core.encode_special_tokens = not special    # the library's name for "as ordinary text"
        return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.core.decode(ids, skip_special_tokens=True)

    def normal(self, text):
        return self.core.normalizer.normalize_str(text) if self.core.normalizer else text

    def words(self):
        """{bytes the token stands for: id}; a token that is not byte-level keeps its string."""
        alphabet = byte_alphabet()
        words = {}
        for word, number in self.core.get_vocab().items():
            if number in self.added:
                words[word.encode()] = number
            elif all(character in alphabet for character in word):
                words[bytes(alphabet[character] for character in word)] = number
            else:
                words[word] = number
        return words


# A .tiktoken file lists tokens and their ranks. It does not say how many there are, the pattern that cuts
# text before merging, the special tokens, or the Unicode form that text is brought into first.
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r'|\s*[\r\n]+|\s+(?!\S)|\s+')
LOWER = r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
UPPER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]'
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (rf'[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SUFFIX}'
                 rf'|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SUFFIX}'
                 r'|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+')
QWEN_SPECIAL = {'<|endoftext|>': 151643, '<|im_start|>': 151644, '<|im_end|>': 151645}
O200K_SPECIAL = {'<|endoftext|>': 199999, '<|endofprompt|>': 200018}
# file name: number of tokens, pattern, special tokens, Unicode form
TIKTOKEN = {
    'qwen.tiktoken': (151_643, QWEN_PATTERN, QWEN_SPECIAL, 'NFC'),
    'o200k_base.tiktoken': (199_998, O200K_PATTERN, O200K_SPECIAL, None),
}


class TiktokenVocabulary:
    """A .tiktoken file whose name is in TIKTOKEN, read by the library `tiktoken`."""
    def __init__(self, file):
        if file.name not in TIKTOKEN:
            raise UserError(f'{file}: the pattern that cuts its text is not known; known files: '
                            f'{", ".join(TIKTOKEN)}')
        count, pattern, special, self.form = TIKTOKEN[file.name]

        # One token per line: its bytes in base 64, then its rank, which is its id.
        self.ranks = {}
        try:
            for line in file.read_bytes().splitlines():
                if line:
                    token, rank = line.split()
                    self.ranks[base64.b64decode(token)] = int(rank)
        except ValueError as error:
            raise UserError(f'{file}: not a tiktoken file ({error}); fetch it again') from None
        if len(self.ranks) != count:
            raise UserError(f'{file}: {len(self.ranks)} tokens, but this vocabulary has {count}; '
                            'fetch it again')
        self.core = tiktoken.Encoding(file.stem, pat_str=pattern, mergeable_ranks=self.ranks,
                                      special_tokens=special)
        self.special = set(special.values())

    def encode(self, text, special=True):
        text = self.normal(text)
        return self.core.encode(text, allowed_special='all') if special else self.core.encode_ordinary(text)

    def normal(self, text):
        return unicodedata.normalize(self.form, text) if self.form else text

    def decode(self, ids):
        return self.core.decode([i for i in ids if i < len(self.ranks)])     # the others write no text

    def words(self):
        """{bytes the token stands for: id}."""
        words = dict(self.ranks)
        for word in self.core.special_tokens_set:
            words[word.encode()] = self.core.encode_single_token(word)
        return words


# ---- the tokenizer of a model folder ----------------------------------------------------------

class Tokenizer:
    """The vocabulary of a Hugging Face folder, with its chat template and its stop ids.

    variables: what the chat template is told in every call, such as enable_thinking.
    words: {bytes: id}. size: one more than the largest id; a model's V is often rounded up from it.
    stop_ids: every id that ends an answer.
    """
    def __init__(self, folder, **variables):
        self.variables = variables
        file = folder / 'tokenizer.json'
        tiktoken_files = sorted(folder.glob('*.tiktoken'))
        if not file.exists() and not tiktoken_files:
            raise UserError(f'{file}: no such file, and no .tiktoken file; the folder needs its tokenizer')

        # tokenizer.json comes first; a .tiktoken file is read where there is none.
        self.name = str(file if file.exists() else tiktoken_files[0])
        self.vocabulary = JsonVocabulary(file) if file.exists() else TiktokenVocabulary(tiktoken_files[0])
        self.words = self.vocabulary.words()
        self.size = max(self.words.values()) + 1

        # The tokens that templates may name. Some files keep each as a string, others as {content: string}.
        settings = {}
        if (folder / 'tokenizer_config.json').exists():
            settings = read_json(folder / 'tokenizer_config.json')
        self.marks = {}
        for key in ('bos_token', 'eos_token', 'pad_token'):
            token = settings.get(key)
            if token:
                self.marks[key] = token['content'] if isinstance(token, dict) else token
        self.stop_ids = self.read_stop_ids(folder)

        # A template is a file of its own, or a string among the settings, or one of several with names
        # there.
        template = settings.get('chat_template')
        if (folder / 'chat_template.jinja').exists():
            template = (folder / 'chat_template.jinja').read_bytes().decode(errors='replace')
        if isinstance(template, list):
            named = {entry['name']: entry['template'] for entry in template}
            template = named.get('default')
        self.template = self.compile(template) if template else None

    def read_stop_ids(self, folder):
        """Every id that ends an answer -> ascending list.

        Models disagree among their own files, so this is the union of what tokenizer_config.json,
        config.json and generation_config.json call eos. Ids that no token has are left out: nothing can
        ever write them.
        """
        found = [self.words.get(str(self.marks.get('eos_token', '')).encode())]
        for name in ('config.json', 'generation_config.json'):
            if (folder / name).exists():
                ids = read_json(folder / name).get('eos_token_id')
                found += ids if isinstance(ids, list) else [ids]
        stop_ids = sorted({i for i in found if type(i) is int and 0 <= i < self.size})
        if not stop_ids:
            raise UserError(f'{folder}: no end-of-text token in config.json, generation_config.json or '
                            'tokenizer_config.json; answers would never end')
        return stop_ids

    def encode(self, text, special=True):
        """Text -> ids, with nothing added. Special tokens written in the text become their ids; with
        special=False they stay ordinary text."""
        return self.vocabulary.encode(text, special)

    def normal(self, text):
        """The Unicode form of a text that `encode` cuts into tokens (Qwen: NFC)."""
        return self.vocabulary.normal(text)

    def decode(self, ids):
        """Ids -> text, without special tokens."""
        return self.vocabulary.decode([i for i in ids if i < self.size])

    def render(self, messages):
        """Messages [{role, content}], or one user's text -> the prompt's text, up to where the assistant
        begins to speak. Without a template: the contents, one on each line."""
        if isinstance(messages, str):
            messages = [{'role': 'user', 'content': messages}]
        if not self.template:
            contents = [message['content'] for message in messages]
            return self.marks.get('bos_token', '') + '\n'.join(contents) + '\n'
        try:
            return self.template.render(messages=messages, add_generation_prompt=True, tools=None,
                                        documents=None, **self.marks, **self.variables)
        except Exception as error:           # the template is somebody else's program
            raise UserError(f'{self.name}: its chat template failed ({error})') from None

    def compile(self, text):
        """A chat template in a sandbox, with the functions that published templates call."""
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=['jinja2.ext.loopcontrols', GenerationTag])
        env.filters['tojson'] = to_json
        env.globals['raise_exception'] = refuse
        env.globals['strftime_now'] = lambda format: datetime.now().strftime(format)
        try:
            return env.from_string(text)
        except (TemplateError, TypeError, AttributeError) as error:
            raise UserError(f'{self.name}: its chat template does not parse ({error})') from None

    def chat(self, messages):
        """Messages -> prompt ids. Special tokens in the rendered text become their ids."""
        return self.encode(self.render(messages))

    @cached_property
    def pieces(self):
        """The bytes of text that each id writes: a list of bytes. Special tokens write none."""
        pieces = [b''] * self.size
        for word, number in self.words.items():
            if isinstance(word, str):
                raise UserError(f'{self.name}: token {number} {word!r} is not byte-level, so its bytes are '
                                'not known; choose a model with a byte-level tokenizer')
            if number not in self.vocabulary.special:
                pieces[number] = word
        return pieces

    def byte_ends(self, ids):
        """Ids -> for each of them, how many bytes of text have been written after it.

        Offsets are exact, also where a character is split over tokens. Example: 'é' is b'\\xc3\\xa9'; if
        each of its bytes is a token of its own, the answer is [1, 2].
        """
        return list(accumulate(len(self.pieces[i]) for i in ids))


class GenerationTag(Extension):
    """{% generation %} .. {% endgeneration %} marks what an assistant wrote, for training masks. The text
    is the same with and without it."""
    tags = {'generation'}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(['name:endgeneration'], drop_needle=True)


def to_json(value, **options):
    """The filter `tojson` as transformers defines it: letters that are not ASCII stay letters."""
    options = {'ensure_ascii': False, **options}
    return json.dumps(value, **options)


def refuse(message):
    """A template calls this for messages that it does not accept."""
    raise TemplateError(message)


def load_tokenizer(path_or_repo, **variables):
    """Tokenizer of a Hugging Face folder or hub id. The variables go to its chat template."""
    return Tokenizer(snapshot(path_or_repo), **variables)


# ---- two tokenizers: do their ids mean the same? ----------------------------------------------

def disagreement(tok_s, tok_t):
    """The first token of tok_t over which two vocabularies disagree, or None if they agree.

    They agree if no string has two ids and no id means two strings. Either side may have extra tokens:
        a=0 b=1   and   a=0 b=1 <end>=2   agree
        a=0 b=1   and   a=0 c=1           disagree over c: id 1 means two strings
        a=0 b=1   and   a=0 b=2           disagree over b: it has two ids
    """
    string_of = {number: word for word, number in tok_s.words.items()}
    for word, number in tok_t.words.items():
        if tok_s.words.get(word, number) != number or string_of.get(number, word) != word:
            return word
    return None


@lru_cache(maxsize=16)
def same_vocabulary(tok_s, tok_t):
    """Can one model read the ids that the other writes? See `disagreement`. Remembered for a pair of
    Tokenizers, because comparing 150,000 tokens takes a while."""
    return disagreement(tok_s, tok_t) is None


def shared_size(tok_s, tok_t):
    """The student writes ids below this number, and both softmaxes of a token-by-token loss run over them.

    If both have the same vocabulary, the smaller size: a token that only one side has at its end is never
    written and never compared, so a run with such a token equals the run without it. The student's own
    size if the vocabularies differ; then the teacher reads text, and no ids are compared.
    """
    return min(tok_s.size, tok_t.size) if same_vocabulary(tok_s, tok_t) else tok_s.size


def stop_set(tok_s, tok_t):
    """Ids that end an answer of the student -> ascending list: its own stop ids, and the teacher's as well
    if ids mean the same to both. Ids that the student never writes (`shared_size`) are left out."""
    ids = set(tok_s.stop_ids)
    if same_vocabulary(tok_s, tok_t):
        ids |= set(tok_t.stop_ids)
    size = shared_size(tok_s, tok_t)
    stop = sorted(i for i in ids if i < size)
    if not stop:
        raise UserError(f'{tok_s.name}: its answers end with id {tok_s.stop_ids[0]}, which {tok_t.name} does '
                        'not have; choose a teacher whose vocabulary has it')
    return stop


def check_ids(name, V, tokenizer):
    """A model whose embedding has fewer rows than the tokenizer has ids is a UserError."""
    if tokenizer.size > V:
        raise UserError(f'{name}: {V} rows in its embedding, but token ids up to {tokenizer.size - 1} in '
                        f'{tokenizer.name}; tokenizer and model do not belong together')
