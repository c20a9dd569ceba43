"""libFuzzer, in this Python: drive.py LIBFUZZER.SO TARGET [libFuzzer's arguments]. fuzz/run calls it."""

import ctypes
import sys

library, target, *arguments = sys.argv[1:]
libfuzzer = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # first: what it is to watch announces itself to it
import targets  # noqa: E402

again = " ".join([sys.executable, *sys.argv[:3]])  # which a shell runs, with libFuzzer's arguments, for -merge=1
argv = [again.encode(), *[argument.encode() for argument in arguments]]
argc = ctypes.c_int(len(argv))
vector = ctypes.pointer((ctypes.c_char_p * (len(argv) + 1))(*argv, None))
function = ctypes.c_void_p(targets.TARGETS[target])
sys.exit(libfuzzer.LLVMFuzzerRunDriver(ctypes.byref(argc), ctypes.byref(vector), function))
