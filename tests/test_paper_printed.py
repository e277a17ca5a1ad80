"""The paper's numbers, and which runs they may stand beside."""
import pytest

from configs import default, free, load_config, reads
from paper.printed import HARMLESS, MEMORY_AND_TIME, PRINTED, SETS, paper_row


def stored(*words):
    """A config as a run on GPUs stores it: the dtype that 'auto' stands for, and the day."""
    return load_config(list(words)) | {'dtype': 'bfloat16', 'date': '2026-11-26'}


@pytest.mark.parametrize('number, words, row', [
    (2, ['configs/r1_1p5b.py'], 'OPRD'),
    (2, ['configs/r1_opd_top1.py', 'seed=3', 'out_dir=elsewhere'], 'OPD top-1'),
    (2, ['configs/r1_opd_top16.py', 'eval_every=100', 'keep=9'], 'OPD top-16'),
    (4, ['configs/bridge_qwen.py', 'bridge=elsewhere'], 'OPRD-Bridge r=8'),
    (5, ['configs/bridge_qwen.py', 'bridge=', 'oprd_weight=0', 'opd_weight=1', 'opd=sampled', 'positions=all'], 'OPD top-1'),
    (6, ['configs/bridge_phi.py', 'teacher_ids=student'], "OPRD-Bridge r=4, student's ids"),
])
def test_the_configs_of_this_project_are_at_the_papers_size(number, words, row):
    """And the row that they are is one that the paper prints."""
    assert paper_row(number, stored(*words)) == (row, [])
    assert row in PRINTED[number].numbers


def test_a_downloaded_copy_is_the_same_model():
    """A folder whose last part is the name on the hub; a set that was saved under its own name."""
    config = stored('configs/r1_1p5b.py', 'student=/models/DeepSeek-R1-Distill-Qwen-1.5B/',
                    'teacher=hbx/JustRL-DeepSeek-1.5B@main', 'eval_data=AIME24,sets/aime25.jsonl,aimo')
    assert paper_row(2, config) == ('OPRD', [])
    name, differences = paper_row(2, config | {'student': '/models/r1', 'eval_data': 'aime24,aime25'})
    assert name is None and [text.split('=')[0] for text in differences] == ['student', 'eval_data']


@pytest.mark.parametrize('words', [['configs/r1_1p5b.py'], ['configs/bridge_qwen.py'], ['configs/r1_opd_top16.py']])
def test_every_key_that_decides_the_result_is_compared(words):
    """A key that is forgotten would let a run of another kind stand beside the paper's number. Each key in turn has another
    value: it is told, or it is one that cannot change a result."""
    paper = stored(*words)
    number = 4 if paper['bridge'] else 2
    told = set()
    for key, value in paper.items():
        other = paper | {key: 'another' if isinstance(value, str) else [value, 'another']}
        name, differences = paper_row(number, other)
        if name is None:
            told.add(key)
            assert differences, key
    untold = set(default) - told
    unread = {key for key in untold if key in reads['distill.py'] and key not in (*free, *HARMLESS) and not key.startswith('toy_')}
    hidden = {'rep_loss', 'layers', 'position_offset'}
    output = {'opd', 'opd_k', 'opd_support', 'opd_tail', 'kl_direction', 'student_temperature', 'teacher_temperature',
              'opd_future', 'opd_baseline'}
    bridge = {'layer_map', 'bridge_rank', 'bridge_normalise', 'pair', 'teacher_ids'}
    # The paper's output-space run here is the top-16 one, and it has no weight of Eq. (6).
    expected = hidden | {'opd_future', 'opd_baseline'} if paper['opd_weight'] else output
    expected |= set() if paper['bridge'] else bridge
    expected |= {'last_k', 'first_k', 'last_frac', 'first_frac'} - {paper['positions']}
    assert unread == expected


def test_a_toy_is_told_with_the_nearest_row():
    name, differences = paper_row(2, load_config(['configs/toy.py', 'opd_weight=1', 'oprd_weight=0', 'opd=sampled']))
    assert name is None and "student='toy' (paper: 'deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B')" in differences
    assert not any(text.startswith(('opd', 'toy_')) for text in differences)


def test_a_run_with_a_bridge_is_no_run_without():
    """Equal widths with a bridge: Eq. (15) in place of Eq. (6), in a table of Eq. (6)."""
    assert paper_row(2, stored('configs/r1_1p5b.py', 'bridge=out/x')) == (None, ['a bridge'])
    assert paper_row(4, stored('configs/bridge_qwen.py', 'bridge='))[1] == ['no bridge']


def test_the_printed_numbers_have_one_value_for_each_set():
    """Spot checks by hand, so that a shifted column is noticed: rows and columns of Tables 2 to 6."""
    for printed in PRINTED.values():
        for numbers in printed.numbers.values():
            assert tuple(numbers) == printed.metrics and all(len(values) == len(SETS) for values in numbers.values())
        assert printed.commands.keys() <= printed.numbers.keys()
    assert PRINTED[2].numbers['OPD top-16']['avg'][SETS.index('aime25')] == 34.0
    assert PRINTED[4].numbers['OPRD-Bridge r=8, then OPD top-1']['best'][SETS.index('aimo')] == 65.1
    assert PRINTED[5].numbers['OPD top-1']['len'][SETS.index('aime24')] == 19120
    assert PRINTED[6].numbers["OPRD-Bridge r=4, student's ids"]['best'][SETS.index('aimo')] == 37.3
    assert MEMORY_AND_TIME['OPD top-16'] == (45.0, 812)
