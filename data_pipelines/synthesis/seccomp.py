"""The system calls that generated code may not make, as a program for the kernel (seccomp-BPF).

It is the second wall, behind the namespaces of `sandbox`, and it does what these cannot:

* No new process and no thread, so there is no fork bomb, nothing outlives the one process, and its memory limit is
  the limit of all. (RLIMIT_NPROC does not do: the kernel exempts root, and counts a user's other processes.)
* No socket but AF_UNIX: AF_VSOCK, by which a virtual machine speaks with its host, is not in the network namespace.
* No memory outside the process's own (System V segments, memory files), which its limit would not count.
* Nothing of ptrace, mount, bpf, keyrings (no namespace has these), perf, io_uring and other large surfaces of the
  kernel that Python does not need.

A refused call fails with EPERM; clone3 with ENOSYS, on which the C library falls back to clone, which fails with
EPERM. Calls of another architecture's table (32-bit, x32) kill the process. Filters stay over execve, and bwrap sets
no_new_privs. Numbers: the kernel's asm/unistd_64.h and asm-generic/unistd.h.
"""

import errno
import platform
import socket
import struct

from data_pipelines.errors import InputError

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000  # the bit that marks the calls of x86-64's 32-bit table

# name: (x86_64, aarch64), None where the machine does not have it
SOCKET = (41, 198)
CLONE3 = (435, 435)
DENIED: dict[str, tuple[int | None, int | None]] = {
    # processes and threads
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "execveat": (322, 281), "uselib": (134, None),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "kcmp": (312, 272),
    # namespaces and file systems
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "swapon": (167, 224), "swapoff": (168, 225),
    # memory that no limit of the process counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    # large surfaces, and what is not in a namespace
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "personality": (135, 92), "syslog": (103, 116), "lookup_dcookie": (212, 18),
    "mbind": (237, 235), "set_mempolicy": (238, 237), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "landlock_create_ruleset": (444, 444), "seccomp": (317, 277), "vhangup": (153, 58),
    # the machine
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "acct": (163, 89), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266), "modify_ldt": (154, None),
    "iopl": (172, None), "ioperm": (173, None),
}  # fmt: skip

# linux/bpf_common.h and linux/seccomp.h
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER, ARCH, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; both machines are little-endian
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000


def program(machine: str | None = None) -> bytes:
    """The filter for `machine`, by default this one, as an array of struct sock_filter. Raises InputError for a
    machine whose calls are not in the table."""
    machine = machine or platform.machine()
    if machine not in AUDIT_ARCH:
        raise InputError(f"the sandbox: found a machine of type {machine!r}; expected {' or '.join(AUDIT_ARCH)}")
    column = list(AUDIT_ARCH).index(machine)
    denied = [number for row in DENIED.values() if (number := row[column]) is not None]
    code = [_step(LOAD, ARCH), _step(JUMP_EQUAL, AUDIT_ARCH[machine], 1), _step(RETURN, KILL), _step(LOAD, NUMBER)]
    if machine == "x86_64":
        code += [_step(JUMP_AT_LEAST, X32, 0, 1), _step(RETURN, KILL)]
    code += [_step(JUMP_EQUAL, CLONE3[column], 0, 1), _step(RETURN, ERRNO | errno.ENOSYS)]
    for number in denied:
        code += [_step(JUMP_EQUAL, number, 0, 1), _step(RETURN, ERRNO | errno.EPERM)]
    code += [_step(JUMP_EQUAL, SOCKET[column], 0, 3), _step(LOAD, FIRST_ARGUMENT)]
    code += [_step(JUMP_EQUAL, socket.AF_UNIX, 1), _step(RETURN, ERRNO | errno.EPERM), _step(RETURN, ALLOW)]
    return b"".join(code)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
