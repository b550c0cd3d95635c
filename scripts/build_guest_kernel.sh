#!/bin/sh
# Builds a small guest kernel for virtual machine sandboxes from the distribution's kernel source.
#
#   scripts/build_guest_kernel.sh [OUTPUT]     default: ./vmlinux-guest
#
# Needs a linux-source package (Debian: linux-source-6.12) or KERNEL_SOURCE=/path/to/an/unpacked/tree, and
# gcc, make, flex, bison, bc, libelf-dev. About 20 minutes of processor time. Then: export RORQUAL_KERNEL=OUTPUT.
# Everything is built in, so the initramfs carries no modules. Nothing is installed, nothing needs root.
set -eu

output=$(realpath -m "${1:-vmlinux-guest}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -n "${KERNEL_SOURCE:-}" ]; then
    mkdir "$work/tree"
    cp -a "$KERNEL_SOURCE/." "$work/tree"
else
    archive=$(ls /usr/src/linux-source-6.*.tar.* 2>/dev/null | sort -V | tail -n 1 || true)
    if [ -z "$archive" ]; then
        echo "no /usr/src/linux-source-6.*.tar.*: install linux-source-6.12, or set KERNEL_SOURCE" >&2
        exit 2
    fi
    mkdir "$work/tree"
    tar -xf "$archive" -C "$work/tree" --strip-components=1
fi

cat >"$work/fragment" <<'CONFIG'
# processor and boot
CONFIG_64BIT=y
CONFIG_SMP=y
CONFIG_NR_CPUS=64
CONFIG_HYPERVISOR_GUEST=y
CONFIG_PARAVIRT=y
CONFIG_KVM_GUEST=y
CONFIG_PVH=y
CONFIG_X86_IOPL_IOPERM=y
CONFIG_BLK_DEV_INITRD=y
CONFIG_PRINTK=y
CONFIG_TTY=y
CONFIG_SERIAL_8250=y
CONFIG_SERIAL_8250_CONSOLE=y
CONFIG_NO_HZ_IDLE=y
CONFIG_HIGH_RES_TIMERS=y
CONFIG_HPET_TIMER=y
CONFIG_RANDOM_TRUST_CPU=y
CONFIG_ACPI=y
CONFIG_PCI=y
CONFIG_PCI_MSI=y
CONFIG_PCI_MMCONFIG=y
CONFIG_PCIEPORTBUS=y
# virtio over PCI and MMIO, also devices named on the command line
CONFIG_VIRTIO_MENU=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_MMIO=y
CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_CONSOLE=y
CONFIG_HW_RANDOM=y
CONFIG_HW_RANDOM_VIRTIO=y
CONFIG_VSOCKETS=y
CONFIG_VIRTIO_VSOCKETS=y
CONFIG_VMGENID=y
# files
CONFIG_BLOCK=y
CONFIG_BLK_DEV=y
CONFIG_EROFS_FS=y
CONFIG_EROFS_FS_XATTR=y
CONFIG_OVERLAY_FS=y
CONFIG_EXT4_FS=y
CONFIG_TMPFS=y
CONFIG_TMPFS_XATTR=y
CONFIG_DEVTMPFS=y
CONFIG_PROC_FS=y
CONFIG_PROC_SYSCTL=y
CONFIG_SYSFS=y
CONFIG_FHANDLE=y
CONFIG_FILE_LOCKING=y
CONFIG_INOTIFY_USER=y
# processes and their bounds
CONFIG_MULTIUSER=y
CONFIG_POSIX_TIMERS=y
CONFIG_FUTEX=y
CONFIG_EPOLL=y
CONFIG_SIGNALFD=y
CONFIG_TIMERFD=y
CONFIG_EVENTFD=y
CONFIG_SHMEM=y
CONFIG_AIO=y
CONFIG_ADVISE_SYSCALLS=y
CONFIG_MEMBARRIER=y
CONFIG_RSEQ=y
CONFIG_BINFMT_ELF=y
CONFIG_BINFMT_SCRIPT=y
CONFIG_UNIX98_PTYS=y
CONFIG_SYSVIPC=y
CONFIG_POSIX_MQUEUE=y
CONFIG_NAMESPACES=y
CONFIG_UTS_NS=y
CONFIG_IPC_NS=y
CONFIG_PID_NS=y
CONFIG_USER_NS=y
CONFIG_NET_NS=y
CONFIG_CGROUPS=y
CONFIG_MEMCG=y
CONFIG_CGROUP_PIDS=y
CONFIG_CGROUP_SCHED=y
CONFIG_FAIR_GROUP_SCHED=y
CONFIG_CFS_BANDWIDTH=y
CONFIG_SECCOMP=y
CONFIG_SECCOMP_FILTER=y
CONFIG_VM_EVENT_COUNTERS=y
# loopback only: no network card has a driver
CONFIG_NET=y
CONFIG_UNIX=y
CONFIG_INET=y
CONFIG_IPV6=y
# what a hostile guest user should find
CONFIG_STACKPROTECTOR_STRONG=y
CONFIG_STRICT_KERNEL_RWX=y
CONFIG_HARDENED_USERCOPY=y
CONFIG_SLAB_FREELIST_RANDOM=y
CONFIG_INIT_ON_ALLOC_DEFAULT_ON=y
CONFIG_MODULES=n
CONFIG_KEXEC=n
CONFIG_BPF_SYSCALL=n
CONFIG_IO_URING=n
CONFIG_USERFAULTFD=n
CONFIG_DEBUG_FS=n
CONFIG_DEVMEM=n
CONFIG
cd "$work/tree"
make -s tinyconfig
./scripts/kconfig/merge_config.sh -m .config "$work/fragment" >/dev/null
make -s olddefconfig
lacking=$(grep -v '^#' "$work/fragment" | grep '=y$' | while read -r line; do grep -qx "$line" .config || echo "$line"; done)
if [ -n "$lacking" ]; then
    echo "this kernel does not offer:" >&2
    echo "$lacking" >&2
fi
make -s -j"$(nproc)" vmlinux
strip --strip-debug -o "$output" vmlinux
echo "$output: use it with  export RORQUAL_KERNEL=$output"
