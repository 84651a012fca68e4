"""The pages of the demo: 200 modules of the standard library, chosen by hand.

``sys.stdlib_module_names`` would not do.  The import of a module must have no side
effect (``this`` prints, ``antigravity`` opens a browser, ``turtle`` needs a display,
``readline`` changes the terminal); it must not need optional C libraries (``ssl``,
``sqlite3``); and the choice should be the same for every supported Python.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from contextlib import redirect_stdout, suppress

_NAMES = """
abc argparse array ast asyncio asyncio.events asyncio.streams asyncio.tasks atexit
base64 bdb binascii bisect builtins cProfile calendar cmath cmd code codecs
collections collections.abc colorsys compileall concurrent.futures configparser
contextlib contextvars copy copyreg csv dataclasses datetime decimal difflib dis
doctest email email.charset email.generator email.header email.headerregistry
email.message email.mime.multipart email.mime.text email.parser email.policy
email.utils encodings enum errno faulthandler fcntl filecmp fileinput fnmatch
fractions ftplib functools gc getopt getpass gettext glob graphlib grp hashlib heapq
hmac html html.parser http http.client http.cookiejar http.cookies http.server imaplib
importlib importlib.abc importlib.metadata importlib.resources importlib.util inspect
io ipaddress itertools json json.decoder json.encoder keyword linecache locale logging
logging.config logging.handlers mailbox marshal math mimetypes mmap modulefinder
multiprocessing multiprocessing.connection multiprocessing.managers
multiprocessing.pool multiprocessing.queues multiprocessing.shared_memory netrc ntpath
numbers opcode operator optparse os pathlib pdb pickle pickletools pkgutil platform
plistlib poplib posix posixpath pprint profile pstats pty pwd py_compile pyclbr pydoc
queue quopri random re reprlib resource runpy sched secrets select selectors shelve
shlex shutil signal smtplib socket socketserver stat statistics string stringprep
struct subprocess symtable sys sysconfig syslog tarfile tempfile termios textwrap
threading time timeit token tokenize tomllib trace traceback tracemalloc types typing
unicodedata unittest unittest.case unittest.mock urllib.parse urllib.request
urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.handlers
wsgiref.simple_server wsgiref.util xml.dom.minidom xml.etree.ElementTree xml.sax
xmlrpc.client xmlrpc.server zipapp zipfile zipimport zoneinfo
"""
MODULES = tuple(_NAMES.split())


def usable() -> list[str]:
    """Those of MODULES that this Python can import.

    Each file is read once, so that it is compiled and in the kernel's cache afterwards.
    Otherwise only the first of two measurements would pay for that.
    """
    names = []
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        for name in MODULES:
            with suppress(ImportError):
                module = importlib.import_module(name)
                names.append(name)
                if source := getattr(module, "__file__", None):
                    with open(source, "rb") as file:
                        file.read()
    return names


if __name__ == "__main__":  # in a process of its own, because it imports them all
    print(json.dumps(usable()))
