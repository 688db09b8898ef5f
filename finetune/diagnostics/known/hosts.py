"""ssh, the launcher, the hostfile, the network, and what ranks hear from each other."""

from __future__ import annotations

from finetune.diagnostics.known import Known
from finetune.diagnostics.known.processes import CONTINUE

INTERFACE = (
    "Name the interface that joins the hosts in `.deepspeed_env` (`ip addr` shows them): GLOO_SOCKET_IFNAME=eth0 and "
    "NCCL_SOCKET_IFNAME=eth0; `finetune doctor ... --write_env` finds it and writes the file"
)
TRY_SSH = "Try `ssh -o BatchMode=yes HOST hostname` for each host of the hostfile, or ask `finetune doctor`"

HOSTS = (
    Known(
        "ssh does not know the host",
        "Its key is not in known_hosts, or is another one than there, e.g. after it was installed anew.",
        "Log in once by hand from the launching machine, or `ssh-keyscan HOST >> ~/.ssh/known_hosts`; a changed "
        "key is "
        "removed with `ssh-keygen -R HOST`.",
        seen=r"host key verification failed|remote host identification has changed|no \w+ host key is known",
    ),
    Known(
        "pdsh is missing",
        "The launcher starts ranks on several hosts with it.",
        "`apt-get install pdsh` on the launching machine; or run the same command on every host with --no_ssh, "
        "--node_rank "
        "and --master_addr.",
        seen=r"launcher '?pdsh'? not installed|pdsh.{0,20}(not found|no such file)",
    ),
    Known(
        "a host cannot be reached over ssh",
        "No sshd, another port, a name that is not known, or a key that is not accepted.",
        f"{TRY_SSH}; another port: --ssh_port. Where there is no ssh (containers), run the same command on every "
        "host with "
        "--no_ssh, --node_rank and --master_addr.",
        seen=r"not reachable via ssh|ssh: connect to host|ssh: could not resolve|could not resolve hostname"
        r"|ssh exited with "
        r"exit code 255|kex_exchange_identification|connection closed by .* port 22\b|no such file.*'ssh'|-> 'ssh'",
    ),
    Known(
        "the hostfile is not as the launcher reads it",
        "A line is not `name slots=N`, a name stands twice, or there is no host in it.",
        "One `name slots=N` a line, without spaces around =, each host once (hostfiles/README.md).",
        seen=r"hostfile (contains|is empty)|hostfile.*not formatted",
    ),
    Known(
        "hosts or slots were named that the hostfile does not have",
        "--include and --exclude take names and slots of the hostfile; without one, the GPUs of this machine as "
        "localhost.",
        'Compare them with --hostfile; for this machine alone: --include "localhost:0,1". CUDA_VISIBLE_DEVICES '
        "does not "
        "choose under the launcher.",
        seen=r"no slot '|not found in hostfile|no extra nodes available|cannot specify num_nodes/gpus",
    ),
    Known(
        ".deepspeed_env has a line that is no NAME=value",
        "The launcher splits every line at its equals sign; a comment or an empty line ends it.",
        "Write nothing but NAME=value lines into it, here and in your home.",
        seen=r"not enough values to unpack",
        kinds=("launcher",),
    ),
    Known(
        "folder or Python are missing on another host",
        "The launcher runs `cd HERE; THIS_PYTHON ...` there: both must be at the same path.",
        "Put the clone with its .venv/ at the same path on every host, or on a shared disk.",
        seen=r"\bcd: .*no such file|cd: can't cd|python[\d.]*: (no such file|(command )?not found)"
        r"|launch: .*no such file",
    ),
    Known(
        "the port is taken",
        "Another run, or what is left of one, listens at the port where ranks meet.",
        "--master_port 29501 (any free one), or end the other run: `ss -ltnp | grep 29500` on the first host shows it.",
        seen=r"address already in use|EADDRINUSE|\[Errno 98\]",
    ),
    Known(
        "gloo announced an address that other hosts cannot reach",
        "It takes what the host's name stands for, and that is 127.0.0.1 on many systems.",
        f"{INTERFACE} (hostfiles/README.md).",
        seen=r"connectFullMesh|timed out connecting|gloo.*(connection refused|loopback)|createDefaultDevice"
        r"|unable to (resolve|find) .*(hostname|interface|address)",
    ),
    Known(
        "an address is not known",
        "The name in --master_addr, or of a host, has no address here, or that address is not this machine's.",
        "`getent hosts NAME` on every host; give --master_addr a number such as 10.0.0.5.",
        seen=r"name or service not known|name resolution|getaddrinfo|gai error|cannot assign requested address"
        r"|EADDRNOTAVAIL"
        r"|no address associated",
    ),
    Known(
        "there is no way to the other host",
        "A firewall, another subnet, or the address of a bridge that exists on one host only (docker0).",
        f"Give --master_addr an address that all hosts reach. {INTERFACE}.",
        seen=r"no route to host|network is unreachable|EHOSTUNREACH|ENETUNREACH",
    ),
    Known(
        "the ranks did not meet",
        "The first host was not reached in time, or some ranks never started: see what their hosts wrote.",
        "Give --master_addr an address that all hosts reach, and a port that no firewall closes (--master_port).",
        seen=r"client socket has timed out|failed to connect/validate|waiting for clients|clients joined|"
        r"(TCPStore|rendezvous).*(timed out|timeout)|torch\.distributed\.DistStoreError",
    ),
    Known(
        "connections are refused",
        "Nobody listens there: rank 0 is not up, or has ended, or a firewall answers in its place.",
        "Look at what rank 0 on the first host wrote; check --master_addr and --master_port.",
        seen=r"connection refused|ECONNREFUSED|\[Errno 111\]",
    ),
    Known(
        "ranks waited too long for one that prepares data or a model",
        "A collective was open meanwhile, and its time is limited.",
        "Raise --ddp_timeout (seconds); more --preprocessing_num_workers; keep prepared data on a disk that all "
        "hosts share "
        "(--data_cache_dir) so that only one of them prepares it.",
        seen=r"watchdog|before timing out|timed out waiting|collective operation timeout|monitoredBarrier",
        phases=("start", "data", "meeting", "model"),
    ),
    Known(
        "InfiniBand does not carry the traffic",
        "An adapter, cable or port fails, or the hosts are not on the same fabric.",
        "`ibstat` on the hosts; NCCL_IB_DISABLE=1 in `.deepspeed_env` goes over TCP, slower, and shows whether it "
        "is this.",
        seen=r"NET/IB|ibv_\w+|IBV_WC|RETRY_EXC|mlx5_",
    ),
    Known(
        "NCCL was used in a wrong way",
        "Mostly two ranks on one GPU, or hosts with different versions of NCCL.",
        "Start one rank per GPU (--num_gpus, slots=), and install the same torch on every host.",
        seen=r"ncclInvalidUsage|ncclInvalidArgument|NCCL version mismatch|mismatched? NCCL",
    ),
    Known(
        "NCCL could not use the network or shared memory",
        "A system call failed: the wrong interface, /dev/shm too small, or too few open files.",
        f"NCCL_DEBUG=WARN tells which. {INTERFACE}; in docker `--shm-size=16g`; `ulimit -n 65536`.",
        seen=r"unhandled system error|ncclSystemError",
    ),
    Known(
        "NCCL met an error of CUDA",
        "Memory for its buffers, a driver that does not fit, or GPUs that cannot reach each other.",
        "NCCL_DEBUG=WARN tells which; leave more memory free (a smaller --per_device_train_batch_size); "
        "NCCL_P2P_DISABLE=1 "
        "shows whether it is the link between the GPUs.",
        seen=r"unhandled cuda error|ncclUnhandledCudaError",
    ),
    Known(
        "a rank did not come to what the others do together",
        "It hangs, is much slower, or had an error of its own: the rank that does not say this is the one to look at.",
        f"See what the other ranks said, and `nvidia-smi`, `dmesg` on their hosts. A slow disk or save: "
        "--ddp_timeout 7200. "
        f"{CONTINUE}",
        seen=r"watchdog|before timing out|timed out waiting|collective operation timeout|monitoredBarrier"
        r"|wait timeout after"
        r"|socket timeout|recvValueWithTimeout",
    ),
    Known(
        "another rank ended first",
        "This is only how this rank noticed: its partner closed the connection because it died or failed.",
        "Look for the rank that says something else, or nothing: it was first. `dmesg` on its host shows whether "
        "it was "
        f"killed. {CONTINUE}",
        seen=r"connection (was )?(likely )?(closed|reset)|(closed|reset) by (remote )?peer|broken pipe"
        r"|remote process exited"
        r"|ncclRemoteError|ncclInternalError|recvValue|failed to (recv|send)|was aborted|communicator .*aborted",
    ),
)
