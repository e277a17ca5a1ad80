"""
A page in a real browser: Chromium, driven through a pipe with the standard library alone (the DevTools protocol).

    with Browser() as browser:
        browser.open('out/toy/view.html')
        browser.point('.token')                              the mouse goes there
        browser.run("document.title")                        what JavaScript says

    python tests/browser.py out/toy/view.html docs/view.png          a picture of the page, one token pointed at

Commands go in through file descriptor 3 as JSON with a zero byte at the end; answers and events come out of
descriptor 4 likewise. Nothing listens on a port. All files of the browser lie in one temporary folder, which
is removed with it. What it does not do: other browsers, several pages at once.
"""
import base64
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

FOUND = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
SECONDS = 120                   # that a command may take, on a machine with much else to do
SWITCHES = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--remote-debugging-pipe',
            '--disable-background-networking', '--disable-component-update', '--hide-scrollbars')


class CannotStart(Exception):
    """There is no browser on this machine, or it does not answer."""


class Browser:
    """A browser with one page. events: everything it has reported, [(name, parameters)]."""
    def __init__(self, width=1200, height=800, scale=1):
        self.width, self.height, self.scale = width, height, scale
        self.events = []
        self.number = 0
        self.buffer = b''

    def __enter__(self):
        if FOUND is None:
            raise CannotStart('no chromium is installed')
        self.profile = tempfile.mkdtemp()
        self.process = None
        pipes = [*os.pipe(), *os.pipe()]
        # High numbers first: a pipe's end could be 3 or 4 itself, where another end belongs.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 100) for end in pipes]
        for end in pipes:
            os.close(end)
        its_in, self.into, self.out, its_out = high
        actions = [(os.POSIX_SPAWN_DUP2, its_in, 3), (os.POSIX_SPAWN_DUP2, its_out, 4),
                   (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        # A scale that the protocol sets would change while a picture is taken, and the mouse with it.
        switches = [*SWITCHES, f'--force-device-scale-factor={self.scale}', f'--user-data-dir={self.profile}']
        folders = dict.fromkeys(('TMPDIR', 'XDG_CONFIG_HOME'), self.profile)
        try:
            self.process = os.posix_spawn(FOUND, [FOUND, *switches], os.environ | folders, file_actions=actions,
                                          setpgroup=0)
            os.close(its_in)
            os.close(its_out)
            self.begin()
        except (OSError, AssertionError) as error:
            self.__exit__()
            raise CannotStart(f'{FOUND}: {error}') from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def begin(self):
        """Make the page, and let it report."""
        self.session = None
        target = self.ask('Target.createTarget', url='about:blank')['targetId']
        self.session = self.ask('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.ask(f'{domain}.enable')
        self.resize(self.width, self.height)

    def __exit__(self, *_):
        if self.process is not None:
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        os.close(self.into)
        os.close(self.out)
        # Its other processes end a moment later, and until then they may write into the folder.
        end = time.monotonic() + SECONDS
        while os.path.exists(self.profile) and time.monotonic() < end:
            shutil.rmtree(self.profile, ignore_errors=True)
            time.sleep(0.01)

    def ask(self, command, **parameters):
        """Send a command and wait for its result."""
        self.number += 1
        message = {'id': self.number, 'method': command, 'params': parameters}
        if self.session:
            message['sessionId'] = self.session
        os.write(self.into, json.dumps(message).encode() + b'\0')
        end = time.monotonic() + SECONDS
        while True:
            answer = self.message(end)
            if answer.get('id') == self.number:
                assert 'error' not in answer, (command, answer)
                return answer['result']

    def message(self, end):
        """The next message, which must be here before the time `end`. An event is noted."""
        while b'\0' not in self.buffer:
            ready, _, _ = select.select([self.out], [], [], max(0, end - time.monotonic()))
            assert ready, f'the browser has not answered within {SECONDS} s'
            part = os.read(self.out, 1 << 16)
            assert part, 'the browser has ended'
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b'\0')
        message = json.loads(text)
        if 'method' in message:
            self.events.append((message['method'], message['params']))
        return message

    def open(self, file):
        """Load a file, and wait until its script has run."""
        self.events.clear()
        self.ask('Page.navigate', url=Path(file).resolve().as_uri())
        end = time.monotonic() + SECONDS
        while not self.seen('Page.loadEventFired'):
            self.message(end)

    def seen(self, name):
        """The parameters of every event of this name."""
        return [parameters for event, parameters in self.events if event == name]

    def run(self, expression):
        """What a JavaScript expression gives."""
        result = self.ask('Runtime.evaluate', expression=expression, returnByValue=True, userGesture=True)
        assert 'exceptionDetails' not in result, result
        return result['result'].get('value')

    def point(self, selector, x=0.5, y=0.5):
        """Move the mouse to a place of an element: x and y are shares of its width and height. A browser drops what comes
        before its first frame, so the mouse is moved until the element knows of it."""
        element = f'document.querySelector({json.dumps(selector)})'
        self.run(f"{element}.scrollIntoView({{block: 'nearest'}})")
        end = time.monotonic() + SECONDS
        while True:
            left, top, width, height = self.run(f'(b => [b.left, b.top, b.width, b.height])({element}.getBoundingClientRect())')
            self.ask('Input.dispatchMouseEvent', type='mouseMoved', x=left + x * width, y=top + y * height)
            if self.run(f"{element}.matches(':hover')"):
                return
            assert time.monotonic() < end, f'the mouse does not reach {selector}'
            time.sleep(0.05)

    def press(self, key):
        """Press a key and let it go."""
        for kind in ('keyDown', 'keyUp'):
            self.ask('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS.get(key, 0))

    def resize(self, width, height):
        self.ask('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=0, mobile=False)

    def media(self, kind='', scheme='light'):
        """Show the page as on paper (kind='print'), or where the system is dark."""
        self.ask('Emulation.setEmulatedMedia', media=kind, features=[{'name': 'prefers-color-scheme', 'value': scheme}])

    def picture(self, file):
        """What the window shows -> a PNG."""
        picture = self.ask('Page.captureScreenshot', format='png')['data']
        Path(file).write_bytes(base64.b64decode(picture))


KEYS = {'Escape': 27, 'ArrowLeft': 37, 'ArrowRight': 39, 'PageUp': 33, 'PageDown': 34, 'Tab': 9, 'End': 35, 'Home': 36}


if __name__ == '__main__':
    page, to = sys.argv[1:]
    with Browser(1180, 740, scale=1.5) as shown:
        shown.open(page)
        shown.point('section:first-child .token.other')
        shown.picture(to)
