// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Where records go: what --output takes, sockets whose reader comes and goes, and how a record looks to the host's
// logs.
#include <array>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "cli/options.h"
#include "cli/outputs.h"
#include "folder.h"
#include "sink/log_formats.h"
#include "sink/unix_socket.h"
#include "source/descriptor.h"

using namespace finrace;
using namespace finrace::test;

namespace {

constexpr std::size_t small_queue = 1U << 20U;

/// What listens under a name, and takes what comes.
class Receiver {
public:
    Receiver(const std::string& name, int type)
        : fd_(::socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)), type_(type)
    {
        ::unlink(name.c_str());
        const std::optional<UnixAddress> address = unix_address(name);
        REQUIRE(address.has_value());
        REQUIRE(::bind(fd_, reinterpret_cast<const sockaddr*>(&address->where), address->size) == 0);
        if (type == SOCK_STREAM)
            REQUIRE(::listen(fd_, 8) == 0);
    }
    ~Receiver()
    {
        ::close(connected_);
        ::close(fd_);
    }
    Receiver(const Receiver&) = delete;
    Receiver& operator=(const Receiver&) = delete;

    /// A stream's bytes so far, or one datagram; empty if there are none.
    std::string take()
    {
        if (type_ == SOCK_STREAM && connected_ < 0)
            connected_ = ::accept4(fd_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
        std::string text(1U << 18U, '\0');
        const ssize_t count = ::recv(type_ == SOCK_STREAM ? connected_ : fd_, text.data(), text.size(), 0);
        text.resize(count > 0 ? static_cast<std::size_t>(count) : 0);
        return text;
    }

private:
    int fd_;
    int type_;
    int connected_ = -1;
};

Json verdict()
{
    return Json::parse(R"({"timestamp": "2026-01-02T03:04:05.123456789Z", "event": {"name": "finrace.verdict"},
        "host": {"name": "proxy-1"}, "process": {"pid": 7, "executable": {"name": "nginx"}},
        "network": {"peer": {"address": "10.0.0.1", "port": 80}},
        "finrace": {"cause": "keepalive_race", "message": "the upstream's “timer”", "incomplete": false,
                    "lost_kinds": ["closed", "peer_fin"], "hints": ["one\ntwo"],
                    "connection": {"idle_ms": 5000.125, "states": [{"state": "CLOSE"}]}}})");
}

/// A journal entry's fields, read as its protocol says.
std::vector<std::pair<std::string, std::string>> fields_of(std::string_view entry)
{
    std::vector<std::pair<std::string, std::string>> fields;
    while (!entry.empty()) {
        const std::size_t end = entry.find_first_of("=\n");
        REQUIRE(end != std::string_view::npos);
        const std::string name(entry.substr(0, end));
        std::size_t size = 0;
        if (entry[end] == '=') {
            entry.remove_prefix(end + 1);
            size = entry.find('\n');
        } else {
            entry.remove_prefix(end + 1);
            for (unsigned i = 0; i < 8; ++i)
                size |= static_cast<std::size_t>(static_cast<unsigned char>(entry[i])) << 8 * i;
            entry.remove_prefix(8);
        }
        REQUIRE(size < entry.size());
        fields.emplace_back(name, entry.substr(0, size));
        REQUIRE(entry[size] == '\n');
        entry.remove_prefix(size + 1);
    }
    return fields;
}

} // namespace

TEST_CASE("what --output takes")
{
    using Kind = OutputTarget::Kind;
    const std::map<std::string, std::pair<Kind, std::string>> good{
        {"-", {Kind::standard_output, ""}},
        {"records.jsonl", {Kind::file, "records.jsonl"}},
        {"syslog.jsonl", {Kind::file, "syslog.jsonl"}},
        {"./syslog", {Kind::file, "./syslog"}},
        {"unix-stream:/run/a", {Kind::stream_socket, "/run/a"}},
        {"unix-dgram:@name", {Kind::datagram_socket, "@name"}},
        {"syslog", {Kind::syslog, "/dev/log"}},
        {"syslog:/run/b", {Kind::syslog, "/run/b"}},
        {"journald", {Kind::journal, "/run/systemd/journal/socket"}},
        {"journald:/run/systemd/journal.web/socket", {Kind::journal, "/run/systemd/journal.web/socket"}},
    };
    for (const auto& [text, wanted] : good) {
        const OutputTarget target = parse_output(text);
        CHECK(target.kind == wanted.first);
        CHECK(target.path == wanted.second);
        CHECK(target.text() == text);
    }
    for (const std::string text :
         {"", "unix-stream", "unix-stream:", "unix-stream:relative", "syslog:", "journald:x", "unix-dgram:@"})
        CHECK_THROWS_AS(parse_output(text), UsageError);
    CHECK_THROWS_WITH(parse_output("unix-dgram:/" + std::string(200, 'x')), Catch::Contains("107 bytes"));
}

TEST_CASE("a stream socket's lines go on to the next reader, whole")
{
    const Folder folder;
    const std::string name = folder.at("socket");
    Stream stream = Stream::to_socket(name, small_queue);
    CHECK(stream.problem() == ENOENT);
    stream.write("before anybody listens");
    stream.flush();
    CHECK(stream.written() == 0);
    CHECK_FALSE(stream.closed_by_reader());

    auto reader = std::make_unique<Receiver>(name, SOCK_STREAM);
    stream.flush();
    CHECK(stream.problem() == 0);
    CHECK(reader->take() == "before anybody listens\n");

    // More than the socket takes: a line's part is out as the reader leaves.
    for (int i = 0; i < 5; ++i)
        stream.write(std::string(200'000, static_cast<char>('a' + i)));
    stream.flush();
    const std::uint64_t out = stream.written();
    REQUIRE(out < 6);
    reader.reset();
    stream.flush();
    CHECK(stream.problem() != 0);
    stream.write("while nobody listens");
    reader = std::make_unique<Receiver>(name, SOCK_STREAM);
    std::string taken;
    for (int i = 0; i < 100; ++i) {
        stream.flush();
        taken += reader->take();
    }
    CHECK(stream.waiting() == 0);
    CHECK(stream.dropped() == 1); // the torn one
    CHECK(stream.written() == 6);
    CHECK(taken.find('\n') % 100'000 == 0);
    CHECK(taken.substr(taken.size() - 21) == "while nobody listens\n");
}

TEST_CASE("a reader of a stream socket that takes nothing costs records, and counts them")
{
    const Folder folder;
    Receiver reader(folder.at("socket"), SOCK_STREAM);
    Stream stream = Stream::to_socket(folder.at("socket"), 10'000);
    int written = 0;
    for (; written < 10'000 && stream.dropped() == 0; ++written) {
        stream.write(std::string(99, 'x'));
        stream.flush();
    }
    CHECK(stream.dropped() == 1);
    CHECK(stream.problem() == 0);
    std::string taken;
    for (std::string part = reader.take(); !part.empty() || stream.waiting() > 0; part = reader.take()) {
        taken += part;
        stream.flush();
    }
    CHECK(taken.size() == static_cast<std::size_t>(written - 1) * 100);
}

TEST_CASE("datagrams go to whoever listens under the name by now, one each")
{
    const Folder folder;
    const std::string name = folder.at("socket");
    Datagrams datagrams(name, small_queue);
    CHECK(datagrams.problem() == ENOENT);
    datagrams.write("one");
    datagrams.flush();
    auto receiver = std::make_unique<Receiver>(name, SOCK_DGRAM);
    datagrams.write("two");
    datagrams.flush();
    CHECK(receiver->take() == "one");
    CHECK(receiver->take() == "two");
    CHECK(receiver->take().empty());
    CHECK(datagrams.problem() == 0);

    receiver.reset();
    datagrams.write("three");
    datagrams.flush();
    CHECK(datagrams.problem() == ECONNREFUSED);
    receiver = std::make_unique<Receiver>(name, SOCK_DGRAM);
    datagrams.flush();
    CHECK(receiver->take() == "three");
    CHECK(datagrams.written() == 3);
    CHECK(datagrams.dropped() == 0);

    // One who restarts between two of them costs none.
    receiver = std::make_unique<Receiver>(name, SOCK_DGRAM);
    datagrams.write("four");
    datagrams.flush();
    CHECK(receiver->take() == "four");
}

TEST_CASE("a full datagram socket costs messages, and counts them")
{
    const Folder folder;
    Receiver receiver(folder.at("socket"), SOCK_DGRAM);
    Datagrams datagrams(folder.at("socket"), 1000);
    std::uint64_t sent = 0;
    for (; sent < 100'000 && datagrams.dropped() == 0; ++sent) {
        datagrams.write(std::string(100, 'x'));
        datagrams.flush();
    }
    CHECK(datagrams.dropped() == 1);
    CHECK(datagrams.waiting() == 1000);
    std::uint64_t taken = 0;
    while (!receiver.take().empty()) {
        ++taken;
        datagrams.flush();
    }
    CHECK(taken == sent - 1);
    datagrams.write(std::string(1000, 'y')); // as much as there is room for
    datagrams.flush();
    CHECK(receiver.take().size() == 1000);

    // One that no socket takes does not stay in the others' way.
    Datagrams large(folder.at("socket"), 64U << 20U);
    large.write(std::string(8U << 20U, 'z'));
    large.write("after");
    large.flush();
    CHECK(large.dropped() == 1);
    CHECK(receiver.take() == "after");
}

TEST_CASE("what remains at the end counts as dropped")
{
    const Folder folder;
    Datagrams datagrams(folder.at("socket"), small_queue);
    datagrams.write("one");
    datagrams.write("two");
    datagrams.flush();
    datagrams.drop_waiting();
    CHECK(datagrams.dropped() == 2);
    CHECK(datagrams.waiting() == 0);
}

TEST_CASE("the same output twice is refused")
{
    const Folder folder;
    const auto refused = [](const std::string& one, const std::string& other) {
        CHECK_THROWS_WITH(Outputs({parse_output(one), parse_output(other)}), Catch::Contains("are the same"));
    };
    refused(folder.at("a"), folder.at("./a"));
    refused("unix-dgram:" + folder.at("b"), "unix-dgram:" + folder.at("b"));
    CHECK_THROWS_WITH(Outputs({parse_output("unix-dgram:" + folder.at("no/b"))}), Catch::Contains("no folder"));
    CHECK_THROWS_WITH(Outputs({parse_output("syslog:" + folder.at("a"))}), Catch::Contains("no socket"));
    Outputs both({parse_output(folder.at("a")), parse_output(folder.at("c"))});
    both.put(verdict());
    both.flush();
    for (const char* name : {"/a", "/c"}) {
        std::ifstream file(folder.path + name);
        std::string line;
        std::getline(file, line);
        CHECK(Json::parse(line) == verdict());
    }
}

TEST_CASE("records are flat from when that is asked for, and until it is no longer")
{
    const Folder folder;
    Outputs outputs({parse_output(folder.at("a"))});
    for (const bool flat : {false, true, false}) {
        outputs.flatten(flat);
        outputs.put(verdict());
    }
    outputs.flush();
    const std::string nested = to_line(verdict()) + "\n";
    CHECK(read_whole(folder.at("a")) == nested + to_line(flattened(verdict())) + "\n" + nested);
}

TEST_CASE("a record as a syslog message")
{
    const std::string message = syslog_message(verdict(), verdict(), 42);
    const std::string header = "<28>1 2026-01-02T03:04:05.123456Z proxy-1 finrace 42 verdict - ";
    REQUIRE(message.starts_with(header));
    CHECK(std::all_of(message.begin(), message.end(), [](char c) { return c >= ' ' && c <= '~'; }));
    CHECK(Json::parse(message.substr(header.size())) == verdict());

    Json health = Json::parse(R"({"event": {"name": "finrace.health"}, "host": {"name": "two words"},
                                  "finrace": {"health": {"complete": true}}})");
    CHECK(syslog_message(health, health, 1).starts_with("<30>1 - - finrace 1 health - {"));
    health["finrace"]["health"]["complete"] = false;
    CHECK(syslog_message(health, health, 1).starts_with("<29>1 "));
}

TEST_CASE("a record as an entry of the journal")
{
    const auto fields = fields_of(journal_entry(verdict()));
    const auto values = [&](const std::string& name) {
        std::vector<std::string> found;
        for (const auto& [field, value] : fields)
            if (field == name)
                found.push_back(value);
        return found;
    };
    using Values = std::vector<std::string>;
    CHECK(values("MESSAGE") == Values{"keepalive_race: the upstream's “timer”"});
    CHECK(values("PRIORITY") == Values{"4"});
    CHECK(values("SYSLOG_IDENTIFIER") == Values{"finrace"});
    CHECK(values("EVENT_NAME") == Values{"finrace.verdict"});
    CHECK(values("NETWORK_PEER_PORT") == Values{"80"});
    CHECK(values("PROCESS_EXECUTABLE_NAME") == Values{"nginx"});
    CHECK(values("FINRACE_CONNECTION_IDLE_MS") == Values{"5000.125"});
    CHECK(values("FINRACE_CONNECTION_STATES") == Values{R"({"state":"CLOSE"})"});
    CHECK(values("FINRACE_INCOMPLETE") == Values{"false"});
    CHECK(values("FINRACE_LOST_KINDS") == Values{"closed", "peer_fin"});
    CHECK(values("FINRACE_HINTS") == Values{"one\ntwo"});
}
