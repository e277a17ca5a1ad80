"""
What runs in the child process in which chat templates are rendered. tokenizer.py starts it; nobody imports
it.

A chat template is a program that comes with a model folder. jinja2's sandbox keeps it from Python, but not
from computing for ever or filling the memory, and `{{ 'a' * 10**9 }}` is computed when it is compiled. So
templates are compiled and rendered under the limits of support/limited.py.

A request is [template, day, variables, conversations]: messages as lists of {role, content}, and the day
that the template is told is today. The answer is {texts} with a text for each conversation, or {failed,
message}: the number of the conversation that failed, and why.

It knows the functions that transformers gives to templates. It does not render tools or documents.
"""
import datetime
import json
from functools import lru_cache

LONGEST = 10**6                 # characters of a prompt; a longer one is an error


def prepare():
    """Import jinja2 -> the function that answers a request."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %} .. {% endgeneration %} marks what an assistant wrote, for training masks. The
        text is the same with and without it."""
        tags = {'generation'}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(['name:endgeneration'], drop_needle=True)

    def raise_exception(message):
        """A template calls this for messages that it does not accept."""
        raise TemplateError(message)

    @lru_cache(maxsize=4)
    def compiled(template, day):
        """A template in the sandbox, with the functions that published templates call."""
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=['jinja2.ext.loopcontrols', GenerationTag])
        env.filters['tojson'] = to_json
        env.globals['raise_exception'] = raise_exception
        env.globals['strftime_now'] = datetime.datetime.fromisoformat(day).strftime      # at midnight
        return env.from_string(template)

    def render(request):
        template, day, variables, conversations = request
        texts = []
        try:
            for messages in conversations:
                text = compiled(template, day).render(
                    messages=messages, add_generation_prompt=True, tools=None, documents=None, **variables)
                if len(text) > LONGEST:
                    raise TemplateError(f'a prompt of {len(text):,} characters, more than {LONGEST:,}')
                texts.append(text)
        except Exception as error:           # the template is somebody else's program
            what = 'does not parse' if isinstance(error, TemplateSyntaxError) else 'failed'
            return {'failed': len(texts), 'message': f'{what} ({describe(error)})'}
        return {'texts': texts}

    # Some of jinja2 is imported at its first use, the handling of errors for example: use it before the
    # limits hold.
    render(['{{ 1 / 0 }}', '2000-01-01', {}, [[]]])
    return render


def to_json(value, **options):
    """The filter `tojson` as transformers defines it: letters that are not ASCII stay letters."""
    options = {'ensure_ascii': False, **options}
    return json.dumps(value, **options)


def describe(error):
    """What an error says, on one line of at most 80 characters. A MemoryError says nothing."""
    if isinstance(error, MemoryError):
        return 'out of memory'
    text = ' '.join(str(error)[:1000].split())
    return text if len(text) <= 80 else text[:77] + '...'
