//! Contract §1: packages, messages, fields, numbers and types on the wire.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorSet};

/// `message: name type number, …`; `[]` marks a repeated field, a capital a message or an enum.
const MESSAGES: &[(&str, &str)] = &[
    (
        "realchat.shared.v1.EventEnvelope",
        "event_type EventType 1, schema_version int32 2, occurred_at Timestamp 3, payload bytes 4",
    ),
    (
        "realchat.message.v1.Message",
        "message_id string 1, conversation_id string 2, sender_user_id string 3, sequence int64 4, \
         message_type string 5, content string 6, metadata_json string 7, sent_at Timestamp 8, \
         deleted_at Timestamp 9",
    ),
    ("realchat.message.v1.MessageSentEvent", "message Message 1"),
    ("realchat.message.v1.MessageDeletedEvent", "conversation_id string 1, message_id string 2"),
    (
        "realchat.message.v1.SyncMessagesRequest",
        "conversation_id string 1, after_sequence int64 2, page_size int32 3",
    ),
    ("realchat.message.v1.SyncMessagesResponse", "messages Message[] 1"),
    (
        "realchat.conversation.v1.Conversation",
        "conversation_id string 1, display_name string 3, avatar_url string 4, \
         created_at Timestamp 5, type ConversationType 6, participant_user_ids string[] 7, \
         participants_with_roles Participant[] 8",
    ),
    ("realchat.conversation.v1.Participant", "user_id string 1, role ParticipantRole 2"),
    (
        "realchat.conversation.v1.ConversationCreatedEvent",
        "conversation Conversation 1, participant_user_ids string[] 2",
    ),
    (
        "realchat.conversation.v1.MembershipChangedEvent",
        "conversation_id string 1, user_id string 2, added bool 3",
    ),
    (
        "realchat.conversation.v1.ReadReceiptUpdatedEvent",
        "conversation_id string 1, user_id string 2, read_sequence int64 3",
    ),
    ("realchat.conversation.v1.GetConversationRequest", "conversation_id string 1"),
    (
        "realchat.conversation.v1.GetConversationResponse",
        "conversation Conversation 1, participant_user_ids string[] 2",
    ),
    ("realchat.conversation.v1.ListConversationsRequest", "user_id string 1"),
    ("realchat.conversation.v1.ListConversationsResponse", "conversations Conversation[] 1"),
    (
        "realchat.presence.v1.RegisterSessionRequest",
        "user_id string 1, device_id string 2, instance_id string 3",
    ),
    ("realchat.presence.v1.RegisterSessionResponse", ""),
    ("realchat.presence.v1.UnregisterSessionRequest", "user_id string 1, device_id string 2"),
    ("realchat.presence.v1.UnregisterSessionResponse", ""),
    ("realchat.presence.v1.RefreshSessionRequest", "user_id string 1, device_id string 2"),
    ("realchat.presence.v1.RefreshSessionResponse", ""),
    ("realchat.presence.v1.GetUserDevicesRequest", "user_id string 1"),
    ("realchat.presence.v1.GetUserDevicesResponse", "devices DeviceInfo[] 1"),
    ("realchat.presence.v1.DeviceInfo", "device_id string 1, instance_id string 2"),
    ("realchat.presence.v1.GetPresenceRequest", "user_ids string[] 1"),
    ("realchat.presence.v1.GetPresenceResponse", "presences UserPresence[] 1"),
    ("realchat.presence.v1.UserPresence", "user_id string 1, online bool 2, device_ids string[] 3"),
    (
        "realchat.presence.v1.PresenceUpdateEvent",
        "user_id string 1, status PresenceStatus 2, occurred_at int64 3",
    ),
    // Both cursors are additions to the contract, which older programs skip: docs/rfcs/0002-cursors.md.
    (
        "realchat.delivery.v1.DeliveryConnectRequest",
        "user_id string 1, device_id string 2, conversation_id string 3, \
         last_received_sequence int64 4, cursor bytes 5",
    ),
    (
        "realchat.delivery.v1.DeliveryEvent",
        "conversation_id string 1, sequence int64 2, message Message 3, cursor bytes 4",
    ),
];

const ENUMS: &[(&str, &str)] = &[
    (
        "realchat.shared.v1.EventType",
        "EVENT_TYPE_UNSPECIFIED 0, EVENT_TYPE_CONVERSATION_CREATED 1, \
         EVENT_TYPE_MEMBERSHIP_CHANGED 2, EVENT_TYPE_MESSAGE_SENT 10, \
         EVENT_TYPE_MESSAGE_DELETED 11, EVENT_TYPE_READ_RECEIPT_UPDATED 12, \
         EVENT_TYPE_PRESENCE_UPDATED 20",
    ),
    (
        "realchat.conversation.v1.ConversationType",
        "CONVERSATION_TYPE_UNSPECIFIED 0, CONVERSATION_TYPE_DIRECT 1, CONVERSATION_TYPE_GROUP 2",
    ),
    (
        "realchat.conversation.v1.ParticipantRole",
        "PARTICIPANT_ROLE_UNSPECIFIED 0, PARTICIPANT_ROLE_MEMBER 1, PARTICIPANT_ROLE_ADMIN 2",
    ),
    (
        "realchat.presence.v1.PresenceStatus",
        "PRESENCE_STATUS_UNSPECIFIED 0, PRESENCE_STATUS_ONLINE 1, PRESENCE_STATUS_OFFLINE 2",
    ),
];

/// `service/method request response`; `stream` before a streamed one.
const METHODS: &[&str] = &[
    "realchat.message.v1.MessageApi/SyncMessages SyncMessagesRequest SyncMessagesResponse",
    "realchat.conversation.v1.ConversationApi/GetConversation GetConversationRequest GetConversationResponse",
    "realchat.conversation.v1.ConversationApi/ListConversations ListConversationsRequest ListConversationsResponse",
    "realchat.presence.v1.PresenceApi/RegisterSession RegisterSessionRequest RegisterSessionResponse",
    "realchat.presence.v1.PresenceApi/UnregisterSession UnregisterSessionRequest UnregisterSessionResponse",
    "realchat.presence.v1.PresenceApi/RefreshSession RefreshSessionRequest RefreshSessionResponse",
    "realchat.presence.v1.PresenceApi/GetUserDevices GetUserDevicesRequest GetUserDevicesResponse",
    "realchat.presence.v1.PresenceApi/GetPresence GetPresenceRequest GetPresenceResponse",
    "realchat.delivery.v1.DeliveryApi/Connect stream DeliveryConnectRequest stream DeliveryEvent",
];

fn files() -> Vec<prost_types::FileDescriptorProto> {
    let set = FileDescriptorSet::decode(delivery::service::events::proto::DESCRIPTORS)
        .expect("descriptors");
    set.file.into_iter().filter(|file| file.package().starts_with("realchat.")).collect()
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn fields(message: &DescriptorProto) -> String {
    let field = |field: &prost_types::FieldDescriptorProto| {
        let kind = match field.r#type() {
            Type::Message | Type::Enum => last_part(field.type_name()).to_owned(),
            scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
        };
        let many = if field.label() == Label::Repeated { "[]" } else { "" };
        format!("{} {kind}{many} {}", field.name(), field.number())
    };
    message.field.iter().map(field).collect::<Vec<_>>().join(", ")
}

fn values(of: &EnumDescriptorProto) -> String {
    let value = |value: &prost_types::EnumValueDescriptorProto| {
        format!("{} {}", value.name(), value.number())
    };
    of.value.iter().map(value).collect::<Vec<_>>().join(", ")
}

fn table(rows: &[(&str, &str)]) -> BTreeMap<String, String> {
    rows.iter().map(|(name, what)| ((*name).to_owned(), (*what).to_owned())).collect()
}

#[test]
fn messages_have_the_fields_of_the_contract() {
    let mut declared = BTreeMap::new();
    for file in files() {
        assert_eq!(file.syntax(), "proto3");
        for message in &file.message_type {
            declared.insert(format!("{}.{}", file.package(), message.name()), fields(message));
        }
    }
    assert_eq!(declared, table(MESSAGES));
}

#[test]
fn enums_have_the_values_of_the_contract() {
    let mut declared = BTreeMap::new();
    for file in files() {
        for of in &file.enum_type {
            declared.insert(format!("{}.{}", file.package(), of.name()), values(of));
        }
    }
    assert_eq!(declared, table(ENUMS));
}

#[test]
fn conversation_keeps_the_number_of_is_group_reserved() {
    let files = files();
    let mut messages = files.iter().flat_map(|file| &file.message_type);
    let conversation = messages.find(|message| message.name() == "Conversation").expect("declared");
    let reserved = &conversation.reserved_range;
    assert!(reserved.iter().any(|range| range.start() <= 2 && range.end() > 2));
}

#[test]
fn services_have_the_methods_of_the_contract() {
    let mut declared = BTreeSet::new();
    for file in files() {
        for service in &file.service {
            for method in &service.method {
                let side = |streams: bool, name: &str| {
                    format!("{}{}", if streams { "stream " } else { "" }, last_part(name))
                };
                declared.insert(format!(
                    "{}.{}/{} {} {}",
                    file.package(),
                    service.name(),
                    method.name(),
                    side(method.client_streaming(), method.input_type()),
                    side(method.server_streaming(), method.output_type())
                ));
            }
        }
    }
    assert_eq!(declared, METHODS.iter().map(|method| (*method).to_owned()).collect());
}
