//! What the program says of itself.

use anyhow::{Result, ensure};
use tests::program::Sidecar;

#[tokio::test(flavor = "multi_thread")]
async fn completions_are_shell_and_know_every_command() -> Result<()> {
    let help = Sidecar::new(["--help"]).run().await?.expect(0)?.stdout;
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let commands: Vec<String> =
        commands.filter_map(|line| line.strip_prefix("  ")?.split(' ').next().map(str::to_owned)).collect();
    ensure!(["restore", "verify", "serve"].iter().all(|name| commands.iter().any(|command| command == name)), "{help}");
    for shell in ["bash", "zsh", "fish"] {
        let script = Sidecar::new(["completions", shell]).run().await?.expect(0)?.stdout;
        for command in commands.iter().filter(|command| !command.is_empty()) {
            ensure!(script.contains(command.as_str()), "{shell} does not know {command}");
        }
        if shell == "bash" {
            let dir = tempfile::tempdir()?;
            let path = dir.path().join("completions.bash");
            std::fs::write(&path, script)?;
            tests::succeed(tokio::process::Command::new("bash").arg("-n").arg(path)).await?;
        }
    }
    Sidecar::new(["completions", "cmd.exe"]).run().await?.expect(2)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manual_has_a_page_for_every_command() -> Result<()> {
    let whole = Sidecar::new(["man"]).run().await?.expect(0)?.stdout;
    ensure!(whole.contains(".TH") && whole.contains("sidecar"), "{whole}");
    let dir = tempfile::tempdir()?;
    Sidecar::new(["man"]).arg(dir.path()).run().await?.expect(0)?;
    for page in ["sidecar", "sidecar-restore", "sidecar-verify", "sidecar-gc", "sidecar-serve"] {
        let text = std::fs::read_to_string(dir.path().join(format!("{page}.1")))?;
        ensure!(text.contains(".SH NAME") && text.contains("OPTIONS"), "{page}: {text}");
    }
    Ok(())
}
