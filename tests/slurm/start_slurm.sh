#!/usr/bin/env bash
# A SLURM of several nodes on this one Debian machine, for tests; needs root, but no systemd:
#   start_slurm.sh start [nodes=2] [cpus of a node=2] | stop | env      then: eval "$(start_slurm.sh env)"
# Every node has as many GPUs as CPUs, which are empty files. Partition main is preempted by urgent, with a grace of a
# minute, and abrupt without any; team takes jobs of the account team alone.
# Exit code 3 where this machine cannot have one: no root, no SLURM, and no apt-get that installs it.
# Everything lies in $SLURM_ROOT, with a munge of its own, on ports that are free; `stop` ends what `start` began, and
# nothing else, and takes the nodes' names out of /etc/hosts again.
set -Eeuo pipefail
root=${SLURM_ROOT:-/tmp/hpcssl-slurm}
export SLURM_CONF=$root/slurm.conf
mark="# hpcssl-slurm $root;"

say() { echo "[slurm] $*" >&2; }

cannot() { # exit code 3: this machine is not one for it
  say "$@"
  exit 3
}

install_packages() {
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
  command -v apt-get >/dev/null || cannot "no SLURM here, and no apt-get to install it with"
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then # packages shall not start services of their own
    trap "rm -f $policy" EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
  fi
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >/dev/null ||
    cannot "apt-get does not install slurm-wlm and munge"
}

free_ports() { # how many -> the first of so many free ports in a row
  local base port
  for base in $(seq 26800 20 27200); do
    for port in $(seq "$base" $((base + $1 - 1))); do
      (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue 2
    done
    echo "$base" && return
  done
  say "no free ports between 26800 and 27200" && return 1
}

write_conf() { # nodes cpus
  local base host
  base=$(free_ports $(($1 + 1)))
  host=$(hostname -s)
  cat >"$SLURM_CONF" <<CONF
ClusterName=hpcssl
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits as long as credentials live before it starts again (default 120 s)
AuthInfo=socket=$root/munge/socket,cred_expire=5
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
SlurmctldPidFile=$root/pid/slurmctld
SlurmdPidFile=$root/pid/%n
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
GresTypes=gpu
JobSubmitPlugins=lua
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,sched_min_interval=200000,batch_sched_delay=0
SlurmdParameters=config_overrides
KillWait=15
# as many clusters have it: only a job that asks for it may be requeued
JobRequeue=0
ReturnToService=2
# a node whose slurmd is gone fails, and its jobs are requeued, after so many seconds (default 300)
SlurmdTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# the state is new with every start; job ids shall be, too, for submitit names files by them
FirstJobId=$(($(date +%s) % 60000000 + 1))
NodeName=DEFAULT CPUs=$2 Gres=gpu:$2 State=UNKNOWN
NodeName=node[1-$1] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((base + 1))-$((base + $1))]
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=abrupt Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
PartitionName=team Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
  mkdir -p "$root/gpus" && seq -f "$root/gpus/%g" "$2" | xargs touch
  printf 'AutoDetect=off\nNodeName=node[1-%s] Name=gpu File=%s\n' "$1" "$root/gpus/[1-$2]" >"$root/gres.conf"
  # of accounts SLURM itself knows nothing without a database
  cat >"$root/job_submit.lua" <<'LUA'
function slurm_job_submit(job, partitions, user)
  return (job.partition == "team" and job.account ~= "team") and slurm.ESLURM_INVALID_ACCOUNT or slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, user)
  return slurm.SUCCESS
end
LUA
  printf 'CgroupPlugin=autodetect\nConstrainCores=no\nConstrainRAMSpace=no\n' >"$root/cgroup.conf"
}

start() { # nodes cpus
  [ "$1" -ge 2 ] || { say "start: nodes = $1; expected at least 2"; return 2; }
  [ "$(id -u)" = 0 ] || cannot "root is needed to run slurmd"
  install_packages
  stop
  trap failed ERR
  rm -rf "$root" && mkdir -p "$root"/{state,spool,pid,log,munge} && chmod 711 "$root" "$root/munge"
  head -c 1024 /dev/urandom >"$root/munge/key" && chmod 600 "$root/munge/key"
  munged --force --key-file="$root/munge/key" --socket="$root/munge/socket" --pid-file="$root/pid/munged" \
    --log-file="$root/log/munged.log" --seed-file="$root/munge/seed"
  write_conf "$1" "$2"
  [ -z "$(tail -c 1 /etc/hosts)" ] || echo >>/etc/hosts # its last line may lack an end
  echo "127.0.0.1 $(seq -s ' ' -f 'node%g' "$1") $mark" >>/etc/hosts # ranks find each other by the nodes' names
  slurmctld -c -f "$SLURM_CONF"
  local node
  for node in $(seq -f 'node%g' "$1"); do
    mkdir -p "$root/spool/$node" && slurmd -N "$node" -f "$SLURM_CONF"
  done
  for _ in $(seq 150); do
    [ "$(sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l)" = "$1" ] && say "$1 nodes are up" && return
    sleep 0.2
  done
  false # a trap is waiting for it
}

failed() { # whatever has begun ends again, and the logs say why
  trap - ERR
  say "did not start: $(tail -q -n 3 "$root"/log/*.log | tr '\n' ' ')"
  stop
}

stop() {
  [ -d "$root/pid" ] || return 0
  if scontrol ping >/dev/null 2>&1; then
    squeue -h -o %A | xargs -r scancel || true
    for _ in $(seq 100); do [ -z "$(squeue -h)" ] && break || sleep 0.2; done # processes that ignore SIGTERM: KillWait
  fi
  local name
  for name in $(cd "$root/pid" && ls | sort -r); do end "$root/pid/$name"; done # slurmctld, nodes, munged
  local kept
  kept=$(grep -vF "$mark" /etc/hosts || true)
  if grep -qF "$mark" /etc/hosts; then printf '%s\n' "$kept" >/etc/hosts; fi # in place: it may be a mount
}

end() { # file with the pid of a daemon of ours; that it is ours its command line says
  local pid
  pid=$(cat "$1")
  for _ in $(seq 100); do
    grep -qF "$root/" "/proc/$pid/cmdline" 2>/dev/null || break
    kill "$pid" 2>/dev/null || true
    sleep 0.1
  done
  if grep -qF "$root/" "/proc/$pid/cmdline" 2>/dev/null; then kill -KILL "$pid"; fi
  rm -f "$1"
}

case ${1:-} in
  start) start "${2:-2}" "${3:-2}" ;;
  stop) stop ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  *) say "usage: start_slurm.sh start [nodes] [cpus] | stop | env" && exit 2 ;;
esac
