"""
The frozen teacher's side: may this pair be distilled, and what does the teacher say of a rollout?

Vanilla OPRD compares hidden states number by number, so student and teacher must have the same
width and the same vocabulary; `check_pair` finds out before anything heavy is loaded. A wrong pair
is an error here, not a worse run later: a teacher fed another vocabulary's ids reads gibberish and
says nothing about it.

Letters: B rows, T tokens, K supervised positions, L layers, d width.
"""
import torch

from data import check_ids
from losses import layer_map
from runtime import UserError


@torch.no_grad()
def hidden_rows(teacher, ids, layers, at, L_s):
    """Teacher states for student layers `layers` at the supervised positions only.

    ids: (B, T). at: flat positions (K,). L_s: the student's depth, for Eq. (11).
    -> {student layer: (K, d)}, each a tensor of its own (layer_loss overwrites it).
    """
    phi = {l: layer_map(l, L_s, teacher.config.L) for l in layers}
    read = sorted(set(phi.values()))
    rows = dict(zip(read, teacher.hidden(ids, read, at), strict=True))
    shared = len(read) < len(layers)
    return {l: rows[t].clone() if shared else rows[t] for l, t in phi.items()}


def check_pair(student, teacher, tok_s, tok_t, layers, question):
    """Everything about a pair that can be wrong in silence -> list of one-line findings.

    student, teacher: ModelConfig. tok_s, tok_t: Tokenizer. layers: the config's choice.
    question: a training question, to compare both chat templates. Raises UserError.
    """
    if student.d != teacher.d:
        raise UserError(f'student width {student.d}, teacher width {teacher.d}: Eq. (6) compares states '
                        'number by number; choose a teacher of the same width')
    if isinstance(layers, list) and max(layers) > student.L:
        raise UserError(f'layers={layers}, but the student has {student.L}; choose from 1 to {student.L}')
    vocab_s, vocab_t = tok_s.words, tok_t.words
    shared = vocab_s.keys() & vocab_t.keys()
    wrong = next((w for w in shared if vocab_s[w] != vocab_t[w]), None)
    ids_s = {i: w for w, i in vocab_s.items()}
    wrong = wrong or next((w for w, i in vocab_t.items() if w not in vocab_s and i in ids_s), None)
    if wrong is not None:
        raise UserError(f"tokenizers differ: id {vocab_t[wrong]} is {wrong!r} to the teacher and "
                        f'{ids_s.get(vocab_t[wrong])!r} to the student, so the teacher would read gibberish; '
                        "choose a teacher with the student's vocabulary")
    check_ids('student', student.V, tok_s)
    check_ids('teacher', teacher.V, tok_t)
    check_ids('teacher', teacher.V, tok_s)           # it reads what the student writes
    prompt_s, prompt_t = tok_s.render(question), tok_t.render(question)
    lines = [f'vocabulary: {len(shared)} tokens with the same id on both sides; only the student has '
             f'{len(vocab_s) - len(shared)} more, only the teacher {len(vocab_t) - len(shared)}',
             f'width {student.d} on both sides; {student.L} student layers onto {teacher.L} by Eq. (11)',
             f'stop ids: student {tok_s.stop_ids}, teacher {tok_t.stop_ids}; answers end at any of them']
    lines += [f'note: the {side} has no chat template; its prompt is the question and a new line'
              for side, tok in (('student', tok_s), ('teacher', tok_t)) if not tok.template]
    if prompt_s == prompt_t:
        lines.append(f'prompt, the same for both: {prompt_s!r}')
    else:
        lines += [f"prompt, student's: {prompt_s!r}", f"prompt, teacher's: {prompt_t!r}",
                  "note: the templates differ; in training and evaluation the teacher reads the student's"]
    return lines
