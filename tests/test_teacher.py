"""Which pairs are refused, and why."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer as HFTokenizer

from formats.huggingface import read_config
from formats.tokenizer import load_tokenizer
from support.preflight import check_pair, match_layers
from support.runtime import UserError


@pytest.fixture
def pair(toy_cfg):
    c, tok = read_config(toy_cfg['student']), load_tokenizer(toy_cfg['student'])
    return dict(student=c, teacher=read_config(toy_cfg['teacher']), tok_s=tok,
                tok_t=load_tokenizer(toy_cfg['teacher']), question='1+2')


def test_a_good_pair(pair):
    lines = check_pair(**pair)
    assert any("'<bos>1+2='" in line for line in lines) and any('stop ids' in line for line in lines)


def test_other_prompts_are_shown_side_by_side(pair):
    pair['tok_t'].template = 'Q: {{ messages[0].content }} A:'
    text = '\n'.join(check_pair(**pair))
    assert "'<bos>1+2='" in text and "'Q: 1+2 A:'" in text and 'templates differ' in text


def swapped(tok):
    """The same words, two of them with each other's ids."""
    text = tok.vocabulary.core.to_str().replace('"3": 7', '"#"').replace('"3":7', '"#"')
    text = text.replace('"4": 8', '"4": 7').replace('"4":8', '"4":7').replace('"#"', '"3":8')
    words = HFTokenizer.from_str(text).get_vocab()
    assert words['3'] == tok.words[b'4'] and words['4'] == tok.words[b'3'] and len(words) == len(tok.words)
    return {w.encode(): i for w, i in words.items()}


def test_refused_pairs(pair):
    """Each would train without complaint and mean nothing."""
    with pytest.raises(UserError, match='student width 24, teacher width 32'):
        check_pair(**pair | {'teacher': replace(pair['teacher'], d=32)})
    lines = check_pair(**pair | {'teacher': replace(pair['teacher'], d=32), 'hidden': False})
    assert any(line.startswith('widths 24 and 32') and 'hidden states are not' in line for line in lines)
    with pytest.raises(UserError, match='do not belong together'):
        check_pair(**pair | {'student': replace(pair['student'], V=20)})
    pair['tok_t'].words = swapped(pair['tok_t'])
    with pytest.raises(UserError, match='tokenizers differ.*gibberish'):
        check_pair(**pair)


def test_layers_by_depth_and_by_hand(toy_cfg):
    """Eq. (11) or a list, one for each; what does not fit is refused."""
    def match(**keys):
        return match_layers({'bridge': '', 'layer_map': 'depth', 'layers': 'all'} | keys, SimpleNamespace(L=3, hf={}), SimpleNamespace(L=5))
    assert match() == {1: 1, 2: 3, 3: 5} and match(layer_map=[1, 1, 4]) == {1: 1, 2: 1, 3: 4}
    assert match(layers=[3, 1], layer_map=[2, 5]) == {1: 2, 3: 5} and match(layer_map='cka', bridge='x')[3] == 5
    for keys, says in ((dict(layers=[1, 4]), 'but the student has 3'), (dict(layer_map=[1, 2]), 'for each of layers'),
                       (dict(layer_map=[1, 2, 6]), '1 to 5'), (dict(layer_map='cka'), 'found by bridge.py')):
        with pytest.raises(UserError, match=says):
            match(**keys)
