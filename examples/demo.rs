//! `make demo`: the main job, step by step, for a person to watch. It uses the tests' harness: a containerd of its own, in namespaces
//! of its own, so that the machine's containers are never touched.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a demo shows, and fails loudly"
)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{process::Command, time::Instant};

use support::{Node, cri_node, image, node::Finished, until};

fn main() {
    let begin = Instant::now();
    println!("\n{}", bold("containerd-shim-proxmox-lxcri-v1: a demo"));
    show_versions();
    note("a containerd of its own, in namespaces of its own; the machine's is not touched");
    note("the images are made here, from busybox; no registry is asked");
    cri_node(async |node| {
        containers(node).await;
        pods(node).await;
    });
    title("Nothing is left behind");
    note("processes, mounts, cgroups, sockets, fifos and files are what they were before");
    println!("\n{} ({:.1} s)\n", bold("Done."), begin.elapsed().as_secs_f64());
}

async fn containers(node: &Node) {
    title("A container through ctr");
    let script = "echo \"hello from $(hostname), process $$, $(uname -r)\"; exit 7";
    let run = ctr_run(node, &["--rm"], "hello", &["sh", "-c", script]).await;
    run.assert_status(7);
    note("its output and its exit status are what ctr's caller sees");

    title("A container in the background");
    ctr_run(node, &["--detach", "--null-io"], "worker", &["sleep", "1000"])
        .await
        .assert_ok();
    ctr(node, &["tasks", "list"]).await.assert_ok();
    ctr(node, &["tasks", "exec", "--exec-id", "look", "worker", "ps"])
        .await
        .assert_ok();
    ctr(node, &["tasks", "pause", "worker"]).await.assert_ok();
    ctr(node, &["tasks", "list"]).await.assert_ok();
    ctr(node, &["tasks", "resume", "worker"]).await.assert_ok();
    ctr(node, &["tasks", "kill", "--signal", "SIGKILL", "worker"])
        .await
        .assert_ok();
    until("it stops", async || {
        let list = node.ctr(&["tasks", "list"]).await.stdout;
        list.contains("STOPPED").then_some(())
    })
    .await;
    ctr(node, &["tasks", "delete", "worker"]).await.assert_ok();
    ctr(node, &["containers", "delete", "worker"]).await.assert_ok();

    title("A program that does not exist");
    let run = ctr_run(node, &["--rm"], "typo", &["no-such-program"]).await;
    run.assert_fails_with("no-such-program");
    note("a clear error, and nothing of the container stays");
}

async fn pods(node: &Node) {
    title("A pod with two containers through CRI, as Kubernetes would run it");
    call("RunPodSandbox", "runtime handler \"lxcri\"");
    let pod = node.pod("shop").await;
    let address = pod.status().await.network.map(|network| network.ip).unwrap_or_default();
    answer(&format!("pod {} is ready, address {address}", short(&pod.id)));

    call("CreateContainer, StartContainer", "web: a small web server");
    let page =
        "mkdir /www; echo 'two containers, one shim' >/www/index.html; echo serving; exec httpd -f -p 80 -h /www";
    let web = pod.sh("web", page).await;
    web.logs("serving").await;
    answer(&format!("container {} runs, its log says \"serving\"", short(&web.id)));

    call(
        "CreateContainer, StartContainer",
        "client: asks the web server over the pod's loopback device",
    );
    let ask = "while ! wget -q -O - http://127.0.0.1/; do sleep 0.05; done; exec sleep 1000";
    let client = pod.sh("client", ask).await;
    client.logs("two containers, one shim").await;
    for (stream, _, text) in client.log().iter().filter(|line| line.2.contains("one shim")) {
        answer(&format!("its log, {stream}: {text}"));
    }

    call("ExecSync", "in client: ip -4 address show eth0 | grep inet; exit 3");
    let response = client
        .exec_sync("ip -4 address show eth0 | grep inet; exit 3", 0)
        .await
        .expect("exec");
    answer(String::from_utf8_lossy(&response.stdout).trim());
    answer(&format!("exit status {}", response.exit_code));

    call("ContainerStats", "of web");
    let (cpu, memory) = until("stats come", async || web.stats().await).await;
    answer(&format!(
        "{:.1} ms of CPU, {} KiB of memory",
        cpu as f64 / 1e6,
        memory / 1024
    ));

    for shim in node.shims() {
        let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", shim.pid)).unwrap_or_default();
        let field = |name: &str| {
            rollup
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap_or("?")
                .trim()
        };
        answer(&format!(
            "one shim for the sandbox and both containers: process {}, {} of memory of its own (Private_Dirty);",
            shim.pid,
            field("Private_Dirty:")
        ));
        answer(&format!(
            "with the program's pages, which all shims of a node share, {} (PSS of this only one)",
            field("Pss:")
        ));
    }

    call("StopContainer", "web, with 1 s of grace");
    web.stop(1).await;
    let status = web.exited().await.exit_code;
    let how = if status == 137 {
        " (this web server ignores SIGTERM, so it was killed)"
    } else {
        ""
    };
    answer(&format!("exit status {status}{how}"));
    call("StopPodSandbox, RemovePodSandbox", "");
    pod.remove().await;
    answer("gone");
}

/// Runs ctr, showing the command and what it says.
async fn ctr(node: &Node, arguments: &[&str]) -> Finished {
    println!("  $ ctr {}", quoted(arguments));
    let begin = Instant::now();
    let finished = node.ctr(arguments).await;
    for line in finished.stdout.lines().chain(finished.stderr.lines()) {
        answer(line);
    }
    note(&format!(
        "exit status {}, {:.0} ms",
        finished.status,
        begin.elapsed().as_secs_f64() * 1e3
    ));
    finished
}

async fn ctr_run(node: &Node, flags: &[&str], id: &str, command: &[&str]) -> Finished {
    let mut arguments = vec!["run"];
    arguments.extend(node.ctr_runtime());
    arguments.extend(flags);
    arguments.extend([image::BUSYBOX, id]);
    arguments.extend(command);
    ctr(node, &arguments).await
}

fn show_versions() {
    for program in ["containerd", "crun"] {
        let output = Command::new(program)
            .arg("--version")
            .output()
            .map(|output| output.stdout)
            .unwrap_or_default();
        let text = String::from_utf8_lossy(&output);
        note(text.lines().next().unwrap_or("?"));
    }
    if let Some(shim) = support::node::our_shim() {
        let bytes = std::fs::metadata(&shim).map_or(0, |metadata| metadata.len());
        note(&format!("{} ({:.1} MB)", shim.display(), bytes as f64 / 1e6));
    }
}

fn quoted(arguments: &[&str]) -> String {
    let plain = |word: &&str| {
        word.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_./:=,".contains(&b))
    };
    let words: Vec<String> = arguments
        .iter()
        .map(|word| {
            if plain(word) {
                word.to_string()
            } else {
                format!("'{word}'")
            }
        })
        .collect();
    words.join(" ")
}

fn title(text: &str) {
    println!("\n{}", bold(text));
}

fn call(rpc: &str, what: &str) {
    println!("  > {rpc}{}{what}", if what.is_empty() { "" } else { ": " });
}

fn answer(text: &str) {
    println!("    {text}");
}

fn note(text: &str) {
    println!("  {}", styled("2", text));
}

fn bold(text: &str) -> String {
    styled("1", text)
}

/// With an escape sequence where a person looks at a terminal.
fn styled(code: &str, text: &str) -> String {
    use std::io::IsTerminal;
    if std::io::stdout().is_terminal() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_string()
    }
}

fn short(id: &str) -> &str {
    &id[..id.len().min(12)]
}
