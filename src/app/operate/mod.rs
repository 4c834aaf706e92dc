//! `delivery admin`: lists and closes sessions, revokes tokens and drains, through the admin API of the nodes.

mod endpoint;
mod table;

use std::path::PathBuf;
use std::thread;

use clap::{Args, Subcommand};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use self::endpoint::Endpoint;
use self::table::Table;
use super::terminal::{complain, print};
use crate::domain::command::Secret;

/// The help text.
pub const ABOUT: &str = "\
Lists and closes sessions, revokes tokens, and drains nodes.

    delivery admin sessions --user alice            # who is connected
    delivery admin close --user alice --device phone
    delivery admin revoke --user alice              # all tokens of alice so far
    delivery admin revoke --everybody               # as after the loss of a key
    delivery admin drain                            # close all sessions, then exit
    delivery admin undrain                          # … before the first one was closed

A command acts on the nodes that --admin names. Give it several times, or give a name that has the addresses of all nodes, \
such as a headless service in Kubernetes:

    delivery admin revoke --user alice --admin http://delivery-headless:8093 --token-file /etc/delivery/admin-tokens

Without a token, only calls from the machine of the node are allowed, and those over its Unix socket \
(--admin unix:/run/delivery/admin.sock). Exit status 1: a node did not answer or has refused. All actions may be \
repeated.";

/// Sessions requested at a time: what a node gives at most.
const PAGE: usize = 1_000;
/// Nodes that one command calls.
const NODES_MAX: usize = 256;

/// The arguments.
#[derive(Args, Debug)]
pub struct Operate {
    /// The admin port of a node: host:port or an http:// URL; a name stands for all its addresses. Or its Unix socket:
    /// unix:/path. May be given several times
    #[arg(
        long,
        env = "DELIVERY_ADMIN",
        global = true,
        value_delimiter = ',',
        default_value = "http://127.0.0.1:8093"
    )]
    admin: Vec<String>,
    /// Token of the nodes
    #[arg(long, env = "ADMIN_TOKEN", global = true, hide_env_values = true)]
    token: Option<String>,
    /// File with the token in its first line; overrides --token
    #[arg(long, env = "ADMIN_TOKEN_FILE", global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Print one JSON object per line instead of a table
    #[arg(long, global = true)]
    json: bool,
    /// What to do
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// List the open sessions of a user, or of everybody
    Sessions {
        /// User id
        #[arg(long)]
        user: Option<String>,
        /// Maximum number of sessions of each node
        #[arg(long, default_value_t = 100, conflicts_with = "all")]
        limit: usize,
        /// List all, however many
        #[arg(long)]
        all: bool,
    },
    /// Close the session of a device, or all of a user, with 1001; clients may return at once
    Close {
        /// User id
        #[arg(long)]
        user: String,
        /// Device id [default: all devices]
        #[arg(long)]
        device: Option<String>,
    },
    /// Refuse the tokens that were issued so far, and close the sessions that have one, with 4401
    Revoke {
        /// User id
        #[arg(long, required_unless_present = "everybody", conflicts_with = "everybody")]
        user: Option<String>,
        /// Of all users
        #[arg(long)]
        everybody: bool,
        /// Only tokens whose `iat` is before this moment: seconds since 1970, or like 2026-11-30T12:00:00Z [default: now, by the
        /// clock of each node]
        #[arg(long)]
        before: Option<String>,
        /// Close at most so many sessions a second on each node, 10 or more, so that not all clients ask for a token at the
        /// same time. Does not wait for that [default: all at once]
        #[arg(long, requires = "everybody")]
        per_second: Option<u32>,
    },
    /// Stop one node: not ready at once, after a delay its sessions are closed, then it exits
    Drain {
        /// How long it serves on, and the drain can be cancelled, such as 10m [default: its DRAIN_DELAY]
        #[arg(long)]
        delay: Option<String>,
    },
    /// Cancel the drain of one node, until its delay is over
    Undrain,
}

/// Carries out the action on all nodes.
///
/// # Errors
/// An argument cannot be used, or an action failed on a node, which was told before.
pub fn run(operate: &Operate) -> Result<(), String> {
    let mut nodes = Vec::new();
    for text in &operate.admin {
        nodes.extend(Endpoint::named(text)?);
    }
    if nodes.len() > NODES_MAX {
        return Err(format!(
            "--admin names {} nodes: at most {NODES_MAX} are possible",
            nodes.len()
        ));
    }
    let call = Call { nodes, token: token(operate)?, json: operate.json };
    match &operate.action {
        Action::Sessions { user, limit, all } => {
            let limit = if *all { usize::MAX } else { *limit };
            call.list(user.as_deref(), limit)
        }
        Action::Close { user, device } => {
            let query = query(&[("user", Some(user)), ("device", device.as_ref())]);
            call.act(&format!("/admin/sessions/close{query}"), &["node", "closed"])
        }
        Action::Revoke { user, before, per_second, .. } => {
            let per_second = per_second.map(|number| number.to_string());
            let everybody = user.is_none().then(|| "true".to_owned());
            let query = query(&[
                ("user", user.as_ref()),
                ("everybody", everybody.as_ref()),
                ("before", before.as_ref()),
                ("per_second", per_second.as_ref()),
            ]);
            call.act(&format!("/admin/tokens/revoke{query}"), &["node", "closed", "before"])
        }
        Action::Drain { delay } => {
            let query = query(&[("delay", delay.as_ref())]);
            call.act_on_one(&format!("/admin/drain{query}"), &["node", "drain"])
        }
        Action::Undrain => call.act_on_one("/admin/undrain", &["node", "drain"]),
    }
}

fn token(operate: &Operate) -> Result<Option<Secret>, String> {
    let Some(path) = &operate.token_file else { return Ok(operate.token.clone().map(Secret::new)) };
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("--token-file: {}: {error}", path.display()))?;
    let first = text.lines().find(|line| !line.is_empty());
    let first = first.ok_or_else(|| format!("--token-file: {}: holds no token", path.display()))?;
    Ok(Some(Secret::new(first.to_owned())))
}

/// The given parameters as a query.
fn query(parameters: &[(&str, Option<&String>)]) -> String {
    let encoded = |text| utf8_percent_encode(text, NON_ALPHANUMERIC);
    let given = parameters.iter().filter_map(|(name, value)| Some((name, (*value)?)));
    let pairs: Vec<_> = given.map(|(name, value)| format!("{name}={}", encoded(value))).collect();
    if pairs.is_empty() { String::new() } else { format!("?{}", pairs.join("&")) }
}

/// The value of a field as the cell of a table.
fn cell(row: &Value, field: &str) -> String {
    match &row[field] {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn heading(fields: &[&str]) -> Table {
    let names: Vec<_> = fields.iter().map(|name| name.to_uppercase().replace('_', " ")).collect();
    Table::new(&names.iter().map(String::as_str).collect::<Vec<_>>())
}

struct Call {
    nodes: Vec<Endpoint>,
    token: Option<Secret>,
    json: bool,
}

impl Call {
    fn show(&self, table: &mut Table, fields: &[&str], rows: &[Value]) -> Result<(), String> {
        if self.json {
            return print(&rows.iter().map(|row| format!("{row}\n")).collect::<String>());
        }
        let cells = |row: &Value| fields.iter().map(|field| cell(row, field)).collect();
        print(&table.rows(&rows.iter().map(cells).collect::<Vec<_>>()))
    }

    /// Posts to all nodes at once.
    fn act(&self, path: &str, fields: &[&str]) -> Result<(), String> {
        let outcomes: Vec<_> = thread::scope(|scope| {
            let post = |node: &Endpoint| node.ask("POST", path, self.token.as_ref());
            let calls: Vec<_> =
                self.nodes.iter().map(|node| scope.spawn(move || post(node))).collect();
            calls.into_iter().map(|call| call.join().expect("no call panics")).collect()
        });
        let (rows, failures): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
        let rows: Vec<_> = rows.into_iter().flatten().collect();
        self.show(&mut heading(fields), fields, &rows)?;
        self.finish(failures.into_iter().filter_map(Result::err).collect())
    }

    /// Posts to the one node.
    fn act_on_one(&self, path: &str, fields: &[&str]) -> Result<(), String> {
        match self.nodes.len() {
            1 => self.act(path, fields),
            number => Err(format!(
                "--admin names {number} nodes: name one, so that the others can take over its clients"
            )),
        }
    }

    /// Lists the sessions of one node after the other.
    fn list(&self, user: Option<&str>, limit: usize) -> Result<(), String> {
        const FIELDS: [&str; 8] =
            ["user", "device", "address", "since", "protocol", "state", "token_issued_at", "node"];
        let mut table = heading(&FIELDS);
        let mut failures = Vec::new();
        for node in &self.nodes {
            let mut left = limit;
            let mut after = None;
            loop {
                let page = left.min(PAGE).to_string();
                let user = user.map(str::to_owned);
                let query = query(&[
                    ("user", user.as_ref()),
                    ("limit", Some(&page)),
                    ("after", after.as_ref()),
                ]);
                let path = format!("/admin/sessions{query}");
                let answer = match node.ask("GET", &path, self.token.as_ref()) {
                    Ok(answer) => answer,
                    Err(why) => {
                        failures.push(why);
                        break;
                    }
                };
                let rows = answer["sessions"].as_array().map_or(&[][..], Vec::as_slice);
                self.show(&mut table, &FIELDS, rows)?;
                left = left.saturating_sub(rows.len());
                after = answer["next"].as_str().map(str::to_owned);
                if after.is_none() {
                    break;
                }
                if left == 0 {
                    complain(&format!("{node} has more sessions: use --limit or --all"));
                    break;
                }
            }
        }
        self.finish(failures)
    }

    fn finish(&self, failures: Vec<String>) -> Result<(), String> {
        let (failed, all) = (failures.len(), self.nodes.len());
        match &failures[..] {
            [] => Ok(()),
            [only] if all == 1 => Err(only.clone()),
            _ => {
                failures.iter().for_each(|why| complain(why));
                Err(format!("{failed} of {all} nodes failed: repeat the command when they answer"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_is_encoded_and_leaves_out_what_is_not_given() {
        let (user, device) = ("a&b=c d".to_owned(), "é".to_owned());
        assert_eq!(
            query(&[("user", Some(&user)), ("none", None), ("device", Some(&device))]),
            "?user=a%26b%3Dc%20d&device=%C3%A9"
        );
        assert_eq!(query(&[("none", None)]), "");
    }
}
