//! A kernel and an initrd that boots into this machine's files.
//!
//! In: which kernel. Out: two files under `target/vm/NAME`, made once for each version that Debian has. The initrd holds
//! busybox, the modules that the cloud kernel has not built in, and the script below as its `init`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Kernel, STATUS, TAG};
use crate::{apt, sh};

pub struct Image {
    pub folder: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

/// A cloud kernel has no 9p; these bring virtiofs and the layer over it. What is built in has no file.
const MODULES: [&str; 3] = ["virtio_pci", "virtiofs", "overlay"];

/// The guest's first process. `@TAG@` and `@STATUS@` are replaced.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for module in $($b cat /modules/order); do $b insmod /modules/$module; done
$b mount -t virtiofs @TAG@ /below
$b mount -t tmpfs layer /layer
$b mkdir /layer/upper /layer/work
$b mount -t overlay -o lowerdir=/below,upperdir=/layer/upper,workdir=/layer/work root /root
command=$($b sed -n 's/.*vm\.command=\([^ ]*\).*/\1/p' /proc/cmdline)
for place in proc sys dev; do $b mount --move /$place /root/$place; done
$b mount -t tmpfs run /root/run
$b mkdir -p /root/dev/shm
$b mount -t tmpfs shm /root/dev/shm
$b mount -t tracefs tracing /root/sys/kernel/tracing
$b mount -t bpf bpf /root/sys/fs/bpf
$b mount -t cgroup2 cgroup /root/sys/fs/cgroup
$b ifconfig lo 127.0.0.1 up
$b chroot /root /bin/sh "$command" </root/dev/null >/root/dev/ttyS1 2>&1
echo "@STATUS@$?" >/root/dev/ttyS1
$b poweroff -f
"#;

/// Fetches and builds what is missing.
pub fn prepare(kernel: Kernel) -> Result<Image> {
    let folder = sh::root().join("target/vm").join(kernel.name);
    let image =
        Image { kernel: folder.join("vmlinuz"), initrd: folder.join("initrd"), folder: folder.clone() };
    // Part of the name, so that a cached one of an older `init` is not taken.
    let recipe = folder.join("init");
    let init = INIT.replace("@TAG@", TAG).replace("@STATUS@", STATUS);
    if image.kernel.is_file()
        && image.initrd.is_file()
        && fs::read_to_string(&recipe).is_ok_and(|old| old == init)
    {
        return Ok(image);
    }
    let unpacked = folder.join("unpacked");
    if unpacked.exists() {
        fs::remove_dir_all(&unpacked).with_context(|| format!("cannot remove {}", unpacked.display()))?;
    }
    println!("fetching Linux {} from Debian's {}", kernel.name, kernel.suite);
    let state = sh::root().join("target/vm/apt").join(kernel.suite);
    apt::unpack_newest(kernel.suite, kernel.security, &state, &unpacked, |name| is_part(name, kernel.name))?;
    let (base, release) = modules_of(&unpacked)?;
    let found = [
        unpacked.join(format!("boot/vmlinuz-{release}")),
        base.join("lib/modules").join(&release).join("vmlinuz"),
    ];
    let vmlinuz = found.iter().find(|file| file.is_file()).context("the package has no vmlinuz")?;
    fs::copy(vmlinuz, &image.kernel)?;
    build_initrd(&folder, &base, &release, &init, &image.initrd)?;
    fs::remove_dir_all(&unpacked)?;
    fs::write(&recipe, init)?;
    Ok(image)
}

/// Whether a package is (a part of) the kernel of this version. `linux-image-6.1.0-50-cloud-amd64` up to 6.19; from 7.0 on
/// `linux-binary-…` and, later, `linux-modules-…` carry what matters.
fn is_part(package: &str, version: &str) -> bool {
    let kinds = ["linux-image-", "linux-binary-", "linux-modules-"];
    let Some(rest) = kinds.iter().find_map(|kind| package.strip_prefix(kind)) else { return false };
    let Some(rest) = rest.strip_prefix(version).and_then(|rest| rest.strip_prefix('.')) else { return false };
    rest.ends_with("-cloud-amd64")
        && !rest.contains("~bpo")
        && !rest.contains("deb11")
        && !rest.contains("-rt-")
}

/// The folder that holds `lib/modules`, and the release that is there.
fn modules_of(unpacked: &Path) -> Result<(PathBuf, String)> {
    for base in [unpacked.to_owned(), unpacked.join("usr")] {
        if let Ok(mut entries) = fs::read_dir(base.join("lib/modules"))
            && let Some(entry) = entries.next()
        {
            return Ok((base, entry?.file_name().to_string_lossy().into_owned()));
        }
    }
    anyhow::bail!("{} has no modules", unpacked.display())
}

fn build_initrd(folder: &Path, base: &Path, release: &str, init: &str, initrd: &Path) -> Result<()> {
    sh::capture(Command::new("/sbin/depmod").arg("-b").arg(base).arg(release))?;
    let tree = folder.join("tree");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    for place in ["bin", "proc", "sys", "dev", "below", "layer", "root", "modules"] {
        fs::create_dir_all(tree.join(place))?;
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox"))?;
    let mut order: Vec<String> = Vec::new();
    for module in MODULES {
        let mut ask = Command::new("/sbin/modprobe");
        ask.arg("-d").arg(base).args(["-S", release, "--show-depends", module]);
        // One that is built in, or that this kernel has not, is none to load: then the guest says what it misses.
        for file in sh::capture(&mut ask).unwrap_or_default().lines().filter_map(insmod) {
            let name = file.rsplit('/').next().unwrap_or_default();
            let plain = name.trim_end_matches(".xz").trim_end_matches(".zst").to_owned();
            if !order.contains(&plain) {
                fs::write(tree.join("modules").join(&plain), module_bytes(file)?)?;
                order.push(plain);
            }
        }
    }
    fs::write(tree.join("modules/order"), order.join("\n"))?;
    fs::write(tree.join("init"), init)?;
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755))?;
    let pack = "find . | cpio --quiet -o -H newc | gzip -1 > \"$0\"";
    sh::capture(Command::new("sh").args(["-c", pack]).arg(initrd).current_dir(&tree))?;
    fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))
}

/// `insmod /path/to/module.ko`
fn insmod(line: &str) -> Option<&str> {
    line.strip_prefix("insmod ").map(|rest| rest.split_whitespace().next().unwrap_or_default())
}

fn module_bytes(file: &str) -> Result<Vec<u8>> {
    let tool = match file.rsplit('.').next() {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(file).with_context(|| format!("cannot read {file}")),
    };
    let output =
        Command::new(tool).args(["-dc", file]).output().with_context(|| format!("cannot start {tool}"))?;
    anyhow::ensure!(output.status.success(), "{tool} cannot unpack {file}");
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernels_packages_are_those_of_its_version() {
        for (package, version, is) in [
            ("linux-image-6.1.0-50-cloud-amd64", "6.1", true),
            ("linux-image-6.1.0-0.deb11.52-cloud-amd64", "6.1", false),
            ("linux-image-6.12.107+deb13-cloud-amd64", "6.1", false),
            ("linux-image-6.12.107+deb13-cloud-amd64", "6.12", true),
            ("linux-image-6.12.107+deb13-rt-amd64", "6.12", false),
            ("linux-image-6.1-cloud-amd64", "6.1", false),
            ("linux-binary-7.2.12+deb13-cloud-amd64", "7.2", true),
            ("linux-modules-7.2.12+deb13-cloud-amd64", "7.2", true),
            ("linux-headers-7.2.12+deb13-cloud-amd64", "7.2", false),
        ] {
            assert_eq!(is_part(package, version), is, "{package}");
        }
    }

    #[test]
    fn modules_are_read_off_modprobe() {
        assert_eq!(
            insmod("insmod /lib/modules/6.1/kernel/fs/fuse/fuse.ko "),
            Some("/lib/modules/6.1/kernel/fs/fuse/fuse.ko")
        );
        assert_eq!(insmod("builtin virtio_pci"), None);
    }
}
