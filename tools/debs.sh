# Debian packages without installing them: fetched by apt and unpacked into a
# folder. What the emulated tests need (a cross compiler, emulators, a kernel)
# then changes nothing on the machine and goes away with `make clean`.
#
# To be sourced by bash. unpack_debs DIR PACKAGE[:ARCH]... leaves the union of
# the packages' files in DIR; dependencies are the caller's business. Nothing
# happens if DIR already holds exactly these.

# Private apt state: one copy of the lists for all callers.
DEBS_APT=target/cross/apt

# Where packages come from: the machine's own Debian sources, and only those,
# since others may lack arm64 or be out of reach.
_debs_configure() {
  local sources
  for sources in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
    [[ -s $sources ]] && break
  done
  [[ -s $sources ]] && command -v apt-get >/dev/null || {
    echo "tools/debs.sh: this needs Debian 12 or newer: apt-get, dpkg and Debian's package sources" \
      "in /etc/apt/sources.list.d/debian.sources or /etc/apt/sources.list" >&2
    return 1
  }
  mkdir -p "$DEBS_APT"/{lists,cache}/partial
  : >"$DEBS_APT/status"
  # The hooks of the system's configuration would act on the system.
  cat >"$DEBS_APT/apt.conf" <<END
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
#clear Acquire::IndexTargets;
APT::Architectures { "amd64"; "arm64"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::IndexTargets::deb::Packages {
  MetaKey "\$(COMPONENT)/binary-\$(ARCHITECTURE)/Packages";
  flatMetaKey "Packages";
  ShortDescription "Packages";
  Description "\$(RELEASE)/\$(COMPONENT) \$(ARCHITECTURE) Packages";
};
Dir::Etc::SourceList "$sources";
Dir::Etc::SourceParts "-";
Dir::State::Lists "$PWD/$DEBS_APT/lists";
Dir::State::status "$PWD/$DEBS_APT/status";
Dir::Cache "$PWD/$DEBS_APT/cache";
END
}

_debs_apt() {
  "apt-$1" -c "$PWD/$DEBS_APT/apt.conf" "${@:2}"
}

# Fetches the package lists where that has not been done.
_debs_lists() {
  [[ -e $DEBS_APT/.updated ]] && return
  _debs_configure
  echo "fetching Debian's package lists" >&2
  _debs_apt get -qq --error-on=any update
  touch "$DEBS_APT/.updated"
}

# The packages that PACKAGE needs and that match the pattern: for those with a
# version in their name.
debs_depends() {
  local package=$1 pattern=$2
  _debs_lists
  _debs_apt cache depends --important "$package" | sed -n 's/^ *Depends: //p' | grep -x -- "$pattern"
}

_debs_download() {
  local dir=$1 conf=$PWD/$DEBS_APT/apt.conf
  shift
  (cd "$dir" && apt-get -c "$conf" -qq download "$@")
}

unpack_debs() {
  local dir=$1 want have deb
  shift
  want=$(printf '%s\n' "$@" | sort)
  have=$(cat "$dir/.packages" 2>/dev/null || true)
  [[ $want == "$have" ]] && return
  _debs_lists
  rm -rf "$dir" "$dir.debs"
  mkdir -p "$dir" "$dir.debs"
  echo "fetching $# Debian packages into $dir" >&2
  if ! _debs_download "$dir.debs" "$@"; then
    # Lists older than the archive name versions that are gone.
    rm "$DEBS_APT/.updated"
    _debs_lists
    _debs_download "$dir.debs" "$@" || {
      echo "tools/debs.sh: apt-get cannot download all of: $*" >&2
      return 1
    }
  fi
  for deb in "$dir.debs"/*.deb; do
    dpkg -x "$deb" "$dir"
  done
  rm -rf "$dir.debs"
  echo "$want" >"$dir/.packages"
}
