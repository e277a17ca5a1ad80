"""
Text in, ids out: tokenizers with their chat templates, and the rule for "the same vocabulary".

Simpler than usual: a tokenizer is a vocabulary (a tokenizer.json or a .tiktoken file), a template, and the
set of ids that end an answer. Padding, truncation and batches do not exist here.

Everything in a model folder is untrusted: templates render in a child process with limits of time and
memory (template_child.py), and nothing is evaluated or unpickled. What it does not do: byte offsets of
tokenizers that are not byte-level, tool calls in templates, .tiktoken files other than the two in TIKTOKEN.
"""
import base64
import datetime
import unicodedata
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path

import tiktoken
from tokenizers import Tokenizer as HFTokenizer

from formats.hub import snapshot
from formats.huggingface import files_along, member
from formats.tables import ANOTHER_MODEL, STOP, TOKENIZER, VOCABULARY
from support.fields import check_fields
from support.files import read_json
from support.limited import LimitedChild, Limits
from support.runtime import UserError, shown

# Conversations are rendered in pieces of so many, or of so many characters. This is what a piece may take.
PIECE = 100
PIECE_CHARACTERS = 10**6
TEMPLATE_LIMITS = Limits(cpu_seconds=1, wall_seconds=30, memory_bytes=2**29)
template_child = LimitedChild(Path(__file__).with_name('template_child.py'), 'chat templates', 'jinja2')


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

@contextmanager
def refused(file, what):
    """An error of the library `tokenizers` in this block is a UserError about the file."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:           # the library raises bare Exception, and a panic of Rust is none
        raise UserError(f'{file}: {what} ({shown(str(error))}); fetch it again') from None


class JsonVocabulary:
    """A tokenizer.json, read by the library `tokenizers`."""
    def __init__(self, file):
        self.file = file
        with refused(file, 'not a tokenizer'):
            self.core = HFTokenizer.from_file(str(file))

        # Published files keep truncation and padding from somebody's training.
        self.core.no_truncation()
        self.core.no_padding()
        self.added = self.core.get_added_tokens_decoder()
        self.special = {number for number, token in self.added.items() if token.special}

    def encode(self, text, special=True):
        self.core.encode_special_tokens = not special    # the library's name for "as ordinary text"
        with refused(self.file, 'it cannot cut a text into tokens'):
            return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        with refused(self.file, 'it cannot make a text of tokens'):
            return self.core.decode(ids, skip_special_tokens=True)

    def normal(self, text):
        if self.core.normalizer is None:
            return text
        with refused(self.file, 'it cannot normalise a text'):
            return self.core.normalizer.normalize_str(text)

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

    date: the day that the chat template is told is today, YYYY-MM-DD; '' = today.
    variables: what it is told besides in every call, such as enable_thinking.
    words: {bytes: id}. size: one more than the largest id; a model's V is often rounded up from it.
    stop_ids: every id that ends an answer.
    """
    def __init__(self, folder, date='', **variables):
        self.variables = variables
        self.date = day(date)
        files_along(folder)                  # a folder that could not be copied later is refused now
        file = member(folder, 'tokenizer.json')
        tiktoken_files = [member(folder, found.name) for found in sorted(folder.glob('*.tiktoken'))]
        if not file.exists() and not tiktoken_files:
            raise UserError(f'{file}: no such file, and no .tiktoken file; the folder needs its tokenizer')

        # tokenizer.json comes first; a .tiktoken file is read where there is none.
        self.vocabulary = JsonVocabulary(file) if file.exists() else TiktokenVocabulary(tiktoken_files[0])
        self.name = str(file if file.exists() else tiktoken_files[0])
        self.words = self.vocabulary.words()
        self.size = max(self.words.values(), default=-1) + 1
        if not 0 < self.size <= VOCABULARY:
            raise UserError(f'{self.name}: {self.size} ids; choose a tokenizer with 1 to {VOCABULARY}')

        # The tokens that templates may name. Some files keep each as a string, others as {content: string}.
        settings = read_fields(folder, 'tokenizer_config.json', TOKENIZER)
        self.marks = {}
        for key in ('bos_token', 'eos_token', 'pad_token'):
            token = settings[key]
            if token:
                self.marks[key] = token['content'] if isinstance(token, dict) else token
        self.stop_ids = self.read_stop_ids(folder)

        # A template is a file of its own, or a string among the settings, or one of several with names
        # there.
        self.template = settings['chat_template']
        file = member(folder, 'chat_template.jinja')
        if file.exists():
            text = file.read_bytes().decode(errors='replace')
            fields = check_fields({'chat_template': text}, TOKENIZER, file, ANOTHER_MODEL)
            self.template = fields['chat_template']
        if isinstance(self.template, list):
            named = {entry['name']: entry['template'] for entry in self.template}
            self.template = named.get('default')

    def read_stop_ids(self, folder):
        """Every id that ends an answer -> ascending list.

        Models disagree among their own files, so this is the union of what tokenizer_config.json,
        config.json and generation_config.json call eos. An id beyond the tokenizer but within the model's
        embedding, which is often rounded up, is left out: nothing can ever write it. An id beyond both is
        another model's.
        """
        found = {self.words.get(self.marks.get('eos_token', '').encode(errors='surrogatepass'))}
        rows = VOCABULARY
        for name in ('config.json', 'generation_config.json'):
            fields = read_fields(folder, name, STOP)
            rows = fields['vocab_size'] or rows
            ids = fields['eos_token_id']
            ids = set(ids if isinstance(ids, list) else [ids]) - {None}
            if ids and max(ids) >= max(rows, self.size):
                raise UserError(f'{folder / name}: eos_token_id = {max(ids)}, but the model has {rows} '
                                'tokens; fetch the folder again')
            found |= ids
        stop_ids = sorted(number for number in found - {None} if number < self.size)
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
        return self.render_all([messages])[0]

    def render_all(self, conversations, origins=None):
        """`render` for a list of conversations, of which many fit into one request to the child process.

        origins: where each conversation comes from, such as 'file, row 7', for errors.
        """
        conversations = [as_messages(conversation) for conversation in conversations]
        if not self.template:
            return [self.without_template(messages) for messages in conversations]
        texts = []
        for piece in in_pieces(conversations):
            request = [self.template, self.date, self.marks | self.variables, piece]
            answer, problem = template_child.ask(request, TEMPLATE_LIMITS)

            # The template is somebody else's program: it can take too long, or end the child process.
            if problem is not None:
                why = {'timeout': f'took more than {TEMPLATE_LIMITS.cpu_seconds} s',
                       'crash': 'ended its process'}[problem]
                raise UserError(f'{self.name}: its chat template {why}; choose another model')
            if 'failed' in answer:
                origin = f"{origins[len(texts) + answer['failed']]}: " if origins else ''
                raise UserError(f"{origin}{self.name}: its chat template {answer['message']}")
            texts += answer['texts']
        return texts

    def without_template(self, messages):
        contents = [message['content'] for message in messages]
        return self.marks.get('bos_token', '') + '\n'.join(contents) + '\n'

    def chat(self, messages):
        """Messages -> prompt ids. Special tokens in the rendered text become their ids."""
        return self.encode(self.render(messages))

    def chat_all(self, conversations, origins=None):
        """`chat` for a list of conversations. origins: see `render_all`."""
        return [self.encode(text) for text in self.render_all(conversations, origins)]

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


def as_messages(conversation):
    """One user's text -> messages; messages as they are."""
    if isinstance(conversation, str):
        return [{'role': 'user', 'content': conversation}]
    return conversation


def in_pieces(conversations):
    """Cut a list of conversations into pieces that are rendered in one request each."""
    piece = []
    size = 0                                 # characters in the piece
    for messages in conversations:
        length = sum(len(message['content']) for message in messages)
        if piece and (len(piece) == PIECE or size + length > PIECE_CHARACTERS):
            yield piece
            piece = []
            size = 0
        piece.append(messages)
        size += length
    if piece:
        yield piece


def read_fields(folder, name, table):
    """The fields of a table, out of a file of a model folder; of a file that is not there, the defaults."""
    file = member(folder, name)
    contents = read_json(file) if file.exists() else {}
    return check_fields(contents, table, file, ANOTHER_MODEL)


def day(date):
    """A date YYYY-MM-DD as it is, and '' as today's."""
    if date == '':
        return datetime.date.today().isoformat()
    try:
        fine = datetime.date.fromisoformat(date).isoformat() == date         # it reads other forms too
    except (ValueError, TypeError):
        fine = False
    if not fine:
        raise UserError(f'date={shown(date)}: not a day; write it like 2026-01-31')
    return date


def load_tokenizer(path_or_repo, date='', **variables):
    """Tokenizer of a Hugging Face folder or hub id. date and the variables go to its chat template."""
    return Tokenizer(snapshot(path_or_repo), date, **variables)


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
